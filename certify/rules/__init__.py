"""One rule file per file of `lipnet.layers`, of the same name, and one for torch's own modules. Importing this package fills the registry."""

from certify.rules import activations as activations
from certify.rules import bro as bro
from certify.rules import foreign as foreign
from certify.rules import fourier as fourier
from certify.rules import gershgorin as gershgorin
from certify.rules import heads as heads
from certify.rules import ldlt as ldlt
from certify.rules import liresnet as liresnet
from certify.rules import operators as operators
from certify.rules import orthogonal as orthogonal
from certify.rules import pooling as pooling
from certify.rules import residual as residual
from certify.rules import same_conv as same_conv
from certify.rules import sandwich as sandwich
from certify.rules import shape as shape
from certify.rules import sll as sll
from certify.rules import torch_conv as torch_conv
from certify.rules import torch_nn as torch_nn
