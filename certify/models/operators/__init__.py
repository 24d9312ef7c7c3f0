"""ONNX operators as torch's own modules, so that the rules see through an imported network. What is not on the list, operator or value, is refused by name.

A signal is kept as torch has it, a batch of inputs in front, whether or not the file writes the batch: every operator must keep the inputs of a batch apart.
This package knows plain nodes and arrays; `certify.models.onnx` makes them of a file. An operator is a function under `@handles` in the file of its family.
"""

from certify.models.operators import activations as activations  # fills the table
from certify.models.operators import arithmetic as arithmetic
from certify.models.operators import convolutions as convolutions
from certify.models.operators import linear as linear
from certify.models.operators import parts as parts
from certify.models.operators import pools as pools
from certify.models.operators import shapes as shapes
