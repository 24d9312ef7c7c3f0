"""From a network to the function that is smoothed: weights as numbers, batch normalisation folded, run by an engine, and tried against the network itself."""

from __future__ import annotations

import copy
import functools
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import lipnet
from certify.device import ieee
from certify.errors import CertifyError
from certify.registry import Shape
from certify.smoothing.engine import Forward
from certify.smoothing.engines import compiled
from lipnet.checkpoint import first_line

_CLOSE = 1e-4  # of a logit, and of how far logits range: more than rounding does, less than another network does
_MOST_ROWS = 1 << 20
_NARROW = 0.25  # of the largest logit: what rounding to 8 bits may do, on random inputs, in a deep network
PART = 1024  # rows of a small network whose activations stay in the second-level cache of a CPU, and in memory that is not mapped anew for each of them
_SUMS, _RELUS = (operator.add, torch.add), (nn.functional.relu, torch.relu)
_FRESH = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their output is in memory of its own


@ieee()
def prepared(
    net: nn.Module, shape: Shape, batch: int, engine: str = "torch", device: torch.device | None = None, dtype: str = "float32"
) -> tuple[Forward, int, tuple[str, ...]]:
    """The function that is smoothed, its number of classes, and what was done to the network for it.

    Each step is kept only if outputs stay those of the network on random batches; `dtype="bfloat16"`, which changes them, is asked for. Raises CertifyError
    like `tried`, and for an engine or a dtype that cannot run the network.
    """
    device = device or torch.device("cpu")
    own, batches, expected = tried(net, shape, batch, device)
    classes = expected[0].shape[1]
    found: nn.Module = own
    done: list[str] = []
    steps: list[tuple[Callable[[nn.Module], nn.Module | None], str]] = [
        (lipnet.freeze, "weights as numbers"),
        (_folded, "batch normalisation folded into convolutions"),
        (_channels_last, "channels last"),
    ]
    if engine == "torch":
        steps += [(_in_place, "sums and ReLU in place"), (functools.partial(_in_parts, batch=batch), f"{PART} rows at a time")]
    for step, name in [] if own_forwards(own) else steps:
        changed = _attempt(step, found, shape)
        if changed is not None and _same(changed, batches, expected):
            found, done = changed, [*done, name]
    if engine == "torch" and dtype == "bfloat16":
        found = _narrow(found, shape, batches, expected)
        done = [*done, "weights and all that is computed in bfloat16"]
    if engine == "torch":
        return found, classes, (*done, "run by torch" if device.type == "cpu" else f"run by torch on {torch.cuda.get_device_name(device)}")
    if device.type != "cpu":
        raise CertifyError(f"{engine} runs a network on the CPU here, and this one is on {device.type}; use the engine torch")
    run = compiled(found, shape, batch, engine)
    if not _same(run, batches, expected):
        raise CertifyError(f"{engine} gives other outputs than the network itself; use the engine torch")
    _check_rows(run, batches[0], _logits(run, batches[0], shape))
    return run, classes, (*done, f"run by {engine}")


@ieee()
def tried(net: nn.Module, shape: Shape, batch: int, device: torch.device | None = None) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A copy of the network, random batches, and its logits there.

    Raises CertifyError for a network that is no classifier of such inputs, is in training mode, has hooks or batch statistics, gives other outputs when it is
    called again, or outputs that depend on the other rows of a batch: this is tried on some batches, as it cannot be proved of every forward (the assumption
    ROW_BY_ROW).
    """
    _refuse(net)
    if not 1 <= batch <= _MOST_ROWS:
        raise CertifyError(f"a batch has from 1 to {_MOST_ROWS} rows, got {batch}")
    device = device or torch.device("cpu")
    batches = _batches(shape, batch, device)
    own = _copy(net)
    expected = [_logits(own, x, shape) for x in batches]
    _check_rows(own, batches[0], expected[0])
    return own, batches, expected


def _copy(net: nn.Module) -> nn.Module:
    """Of a network's own, to be changed."""
    try:
        return copy.deepcopy(net).eval().requires_grad_(False)
    except Exception as error:  # a tensor with a gradient history that the module keeps, an open file
        raise CertifyError(f"the network cannot be copied ({first_line(error)}); let it keep nothing but its parameters and buffers") from error


def _refuse(net: nn.Module) -> None:
    """Modules whose output is not a function of one input alone, as far as they say so themselves."""
    for path, module in net.named_modules():
        where = path or type(net).__name__
        if module.training:
            raise CertifyError(
                f"the network is in training mode (at {where}), where an output may depend on the other inputs of a batch; call net.eval() first"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise CertifyError(f"the network has forward hooks (at {where}), which may change its output; remove them, or put them into a forward")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise CertifyError(
                f"the network has a batch normalisation without running statistics (at {where}), so an output depends on the other inputs of a batch"
            )


@torch.no_grad()
def _batches(shape: Shape, batch: int, device: torch.device) -> list[Tensor]:
    """Inputs of several sizes, in the layout of the engine."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.rand(batch, *shape, generator=generator), 2 * torch.randn(batch, *shape, generator=generator)]
    return [(x.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else x).to(device) for x in plain]


@torch.no_grad()
def _logits(forward: Forward, x: Tensor, shape: Shape, dtype: str = "float32") -> Tensor:
    """What the network says of a batch. Raises CertifyError where it is no classifier of such inputs."""
    try:
        logits = forward(x.clone())
    except Exception as error:  # torch raises many kinds here
        hint = "; convert it with net.float()" if "dtype" in first_line(error) else ""  # a network in half precision
        raise CertifyError(f"the network does not take {len(x)} inputs of shape {shape} in {dtype}: {first_line(error)}{hint}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CertifyError(f"a classifier returns (batch, classes) with at least two classes, this network returns {found} for {len(x)} inputs")
    return logits


@torch.no_grad()
def _check_rows(forward: Forward, x: Tensor, expected: Tensor) -> None:
    """The same again, and with other rows beside them: other data, another order, and NaN, as in padding."""
    if not torch.equal(forward(x.clone()).nan_to_num(), expected.nan_to_num()):
        raise CertifyError("the network gives other outputs when it is called again (random numbers, or a state that moves); make it a function of its input")
    half = len(x) // 2
    if half == 0:
        return
    for others in (x[half:].flip(0), 3 * x[half:] - 1, torch.full_like(x[half:], torch.nan)):
        try:
            found = forward(torch.cat([x[:half], others]))
        except Exception as error:
            raise CertifyError(f"the network fails on a batch in which some rows are NaN, as padding is ({first_line(error)}); let it pass them on") from error
        if not close(torch.cat([found[:half], expected[half:]]), expected):
            raise CertifyError("the network's output for an input depends on the other inputs of its batch; certificates are of functions of one input")


@torch.no_grad()
def _same(forward: Forward, batches: list[Tensor], expected: list[Tensor]) -> bool:
    try:
        return all(close(forward(x.clone()), logits) for x, logits in zip(batches, expected, strict=True))
    except Exception:  # a step that broke the network is not taken
        return False


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether outputs are those of one network, up to rounding: of each logit, and of how far logits range over the rows, for a masked class is at -1e9."""
    known = expected.nan_to_num(posinf=0.0, neginf=0.0)
    size = (known.amax(0) - known.amin(0) if len(known) > 1 else known.abs()).max().item()
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=_CLOSE, atol=_CLOSE * size, equal_nan=True)


def own_forwards(net: nn.Module) -> bool:
    """Whether some module has a forward of its own: torch.fx, which goes by types, does not see it."""
    return any("forward" in vars(module) for module in net.modules())


def _attempt(step: Callable[[nn.Module], nn.Module | None], net: nn.Module, shape: Shape) -> nn.Module | None:
    """The network after a step, or None where the step does not apply."""
    if (step is _folded and not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())) or (step is _channels_last and len(shape) != 3):
        return None
    try:
        changed = step(copy.deepcopy(net))
        return None if changed is None else changed.eval().requires_grad_(False)
    except Exception:  # a forward that torch.fx cannot trace
        return None


def _folded(net: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse(net)


def _channels_last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _in_place(net: nn.Module) -> nn.Module | None:
    """The same numbers, bit by bit, without new memory: a ReLU of what a layer or a sum has just made and nothing else reads, and a sum onto such a layer.

    Linear layers are called as functions, for a small network waits longer for `nn.Module.__call__` than for its ReLU.
    """
    traced = net if isinstance(net, fx.GraphModule) else fx.symbolic_trace(net)
    layers, nodes = dict(traced.named_modules()), traced.graph.nodes

    ours: set[fx.Node] = set()

    def is_made(node: object, functions: tuple[Any, ...] = ()) -> bool:
        """By a layer, one of the functions or a sum of ours, for one other node alone."""
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return False
        if node.op == "call_module":
            return type(layers[str(node.target)]) in _FRESH
        return node in ours or (node.op == "call_function" and node.target in functions)

    for node in nodes:
        first = node.args[0] if node.args else None
        if node.op == "call_function" and node.target in _SUMS and not node.kwargs and is_made(first):
            node.target = operator.iadd
            ours.add(node)
        relu = type(layers[str(node.target)]) is nn.ReLU if node.op == "call_module" else node.op == "call_function" and node.target in _RELUS
        if relu and is_made(first, _SUMS):
            node.op, node.target, node.kwargs = "call_function", torch.relu_, {}
            ours.add(node)
    if not ours:
        return None
    for node in [node for node in nodes if node.op == "call_module" and type(layers[str(node.target)]) is nn.Linear and not node.kwargs]:
        with traced.graph.inserting_before(node):
            weight = traced.graph.get_attr(f"{node.target}.weight")
            bias = None if layers[str(node.target)].bias is None else traced.graph.get_attr(f"{node.target}.bias")
        node.op, node.target, node.args = "call_function", nn.functional.linear, (node.args[0], weight, bias)
    traced.recompile()
    return traced


class _Narrow(nn.Module):
    """A network in bfloat16, of inputs that are rounded to it; its logits as float32 numbers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.to(torch.bfloat16)).float()
        return logits


def _narrow(net: nn.Module, shape: Shape, batches: list[Tensor], expected: list[Tensor]) -> nn.Module:
    """The network in bfloat16. Raises CertifyError where that does not run, is another network altogether, or depends on the rows of a batch."""
    narrow = _Narrow(copy.deepcopy(net).to(torch.bfloat16))
    found = [_logits(narrow, x, shape, "bfloat16") for x in batches]
    apart = max(float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True))
    if apart > _NARROW:
        raise CertifyError(
            f"in bfloat16 the logits of the network move by {apart:.2g} of the largest, more than rounding is expected to ({_NARROW}); use float32"
        )
    _check_rows(narrow, batches[0], found[0])
    return narrow


class Parts(nn.Module):
    """A network on the rows of a batch, always as many at a time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.split(PART)])


def _in_parts(net: nn.Module, batch: int) -> nn.Module | None:
    """On a GPU, and where a batch is no multiple of a part, it is done at once."""
    here = all(tensor.device.type == "cpu" for tensor in net.state_dict().values())
    return Parts(net) if here and batch > PART and batch % PART == 0 else None
