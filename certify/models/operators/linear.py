"""Dense layers, and batch normalisation with stored statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from certify.models.operators.importer import BATCH_NORM, Importer, Node, Signal, handles


def _exactly(node: Node, tensor: Tensor, attribute: str) -> Tensor:
    """A constant times a factor of the node, where the product is a number of the same type: the weights stay those of the file."""
    factor = float(node.get(attribute, 1.0))
    product = tensor * factor
    mantissa, _ = math.frexp(factor)
    if abs(mantissa) != 0.5 or not torch.equal(product / factor, tensor):  # not a power of two, or too small or too large
        node.refuse("the product with the weights would be rounded; 1 and other powers of two are supported", attribute)
    return product


def _linear(importer: Importer, node: Node, x: Signal, weight: Tensor, bias: Tensor | None = None) -> Signal:
    if not x.shape or weight.shape[1] != x.shape[-1]:
        node.refuse(f"weights for {weight.shape[1]} entries do not fit a signal of shape {x.shape}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=importer.dtype)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return importer.call(node, layer, x)


@handles("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def _gemm(importer: Importer, node: Node, x: Signal) -> Signal:
    """`alpha x B + beta C`."""
    if node.get("transA", 0) != 0:
        node.refuse("the first factor must not be transposed", "transA")
    if x.batch is None or len(x.shape) != 1:
        node.refuse(f"a signal of shape {x.shape} is not one vector for each input")
    weight = importer.weight(node, 1, 2)
    weight = _exactly(node, weight if node.get("transB", 0) else weight.T, "alpha")
    if len(node.inputs) < 3 or not node.inputs[2]:
        return _linear(importer, node, x, weight)
    outputs = Signal(x.node, (weight.shape[0],), x.batch)
    held = importer.aligned(node, outputs, importer.weight(node, 2)).expand(weight.shape[0])
    return _linear(importer, node, x, weight, _exactly(node, held, "beta"))


@handles("MatMul")
def _matmul(importer: Importer, node: Node, x: Signal) -> Signal:
    """`x B`, or `A x` of a vector."""
    if importer.values[node.inputs[0]] is x:
        return _linear(importer, node, x, importer.weight(node, 1, 2).T)
    if x.batch is not None or len(x.shape) != 1:
        node.refuse(f"a constant from the left on a signal of {'a batch of ' if x.batch else ''}{x.shape} is not supported; put the signal first")
    return _linear(importer, node, x, importer.weight(node, 0, 2))


@handles("BatchNormalization", attributes=("epsilon", "momentum", "training_mode", "spatial"))
def _batch_norm(importer: Importer, node: Node, x: Signal) -> Signal:
    """With stored statistics; `momentum` matters in training alone."""
    for attribute, wanted in (("training_mode", 0), ("spatial", 1)):
        if node.get(attribute, wanted) != wanted:
            node.refuse("only inference, with one mean and variance for each channel, is supported", attribute)
    if len(x.shape) not in BATCH_NORM or x.batch is None or any(node.outputs[1:]):
        node.refuse(f"on a signal of shape {x.shape}, with {len(node.outputs)} outputs, it is not supported; export in eval mode")
    tensors = [importer.weight(node, place, 1) for place in (1, 2, 3, 4)]
    if any(len(tensor) != x.shape[0] for tensor in tensors):
        node.refuse(f"its constants do not fit {x.shape[0]} channels")
    layer = BATCH_NORM[len(x.shape)](x.shape[0], eps=float(node.get("epsilon", 1e-5))).to(importer.dtype)
    layer.load_state_dict(dict(zip(("weight", "bias", "running_mean", "running_var"), tensors, strict=True)), strict=False)
    return importer.call(node, layer, x)
