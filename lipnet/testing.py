"""`check_layer`: what every layer of this package passes, for layers that others write too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipnet.frozen import freeze


def check_layer(
    make: Callable[[], nn.Module], input_shape: tuple[int, ...], constant: float | None = None, seed: int = 0, batch_statistics: bool = False
) -> None:
    """Raise AssertionError, with a sentence, unless the layer that `make()` returns keeps the promises of a `lipnet` layer.

    Its parameters are all there before the first forward and each gets a gradient; outputs do not depend on train or eval mode (unless the layer is said to
    have `batch_statistics` while training); they follow every change of
    the parameters at once (in place, by `load_state_dict` in eval mode, by a fused optimiser), so nothing is cached; the frozen layer and the float64 layer
    give the same outputs; and no slope seen exceeds `constant` (l2 to l2), where one is given.
    """
    torch.manual_seed(seed)
    layer = make()
    x = torch.randn(16, *input_shape)
    _check_parameters(layer, x)
    _check_outputs_follow_parameters(make, layer, x, batch_statistics)
    _check_copies(layer, x)
    if constant is not None:
        seen = largest_slope(layer, input_shape, seed=seed)
        assert seen <= constant * (1 + 1e-5), f"a slope of {seen:.7g} was seen, above the constant {constant:.7g}"


def largest_slope(net: nn.Module, input_shape: tuple[int, ...], points: int = 32, seed: int = 0) -> float:
    """The largest spectral norm of the Jacobian of the frozen float64 network at random points of several scales: an estimate from below."""
    generator = torch.Generator().manual_seed(seed)
    frozen = freeze(net).double()
    slopes = []
    for i in range(points):
        x = torch.randn(1, *input_shape, generator=generator, dtype=torch.float64) * 10.0 ** (i % 4 - 2)
        jacobian = torch.autograd.functional.jacobian(frozen, x).reshape(-1, x.numel())
        slopes.append(torch.linalg.matrix_norm(jacobian, 2).item())
    return max(slopes)


def _check_parameters(layer: nn.Module, x: Tensor) -> None:
    before = [(name, p.shape) for name, p in layer.named_parameters()]
    layer(x)
    assert before == [(name, p.shape) for name, p in layer.named_parameters()], (
        "the list of parameters changed in the first forward; an optimiser would miss some"
    )
    with torch.no_grad():  # away from the start, where a gradient may vanish by symmetry (psi of a sandwich layer without biases)
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if not before:
        return
    out = layer(x)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in layer.named_parameters():
        dead = parameter.grad is None or not parameter.grad.abs().max() > 1e-7
        assert not dead, f"the parameter {name} gets no gradient"
    layer.zero_grad()


def _check_outputs_follow_parameters(make: Callable[[], nn.Module], layer: nn.Module, x: Tensor, batch_statistics: bool) -> None:
    with torch.no_grad():
        train, evaluated = layer.train()(x), layer.eval()(x)
        assert batch_statistics or torch.equal(train, evaluated), "outputs differ between train and eval mode"
        other = make().eval()
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x)), "outputs are stale after load_state_dict in eval mode"
        for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            mine.data.mul_(1.25)
            theirs.copy_(mine)
        fresh = make().eval()
        fresh.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), fresh(x)), "outputs are stale after an edit of the parameters in place"
    if list(layer.parameters()):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, fused=True)
        layer(x).square().sum().backward()
        optimizer.step()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), fresh(x)), "outputs are stale after a fused optimiser step"
        layer.zero_grad()


@torch.no_grad()
def _check_copies(layer: nn.Module, x: Tensor) -> None:
    out = layer.eval()(x)
    frozen = freeze(layer)
    scale = out.abs().max().clamp_min(1)
    assert (frozen(x) - out).abs().max() <= 1e-5 * scale, "the frozen layer gives other outputs"
    ours = [type(module).__name__ for module in frozen.modules() if type(module).__module__.split(".")[0] == "lipnet"]
    assert not ours, f"the frozen layer still holds {ours}"
    double = copy.deepcopy(layer).double()
    assert (double(x.double()) - out).abs().max() <= 1e-3 * scale, "the float64 layer gives other outputs"
