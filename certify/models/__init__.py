"""Models named by a spec string, loaded without running any code that the user did not name."""

from certify.models.load import Model as Model
from certify.models.load import load as load
from certify.models.onnx import from_onnx as from_onnx
from certify.models.weights import ModelError as ModelError
