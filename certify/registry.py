"""Which module types and operations are known, and by which rule. What is not known is refused, never assumed.

A rule is keyed by type, or by the name of a type of a package that is not imported here, and looked up through the method resolution order, for the class
whose methods the module really runs: a subclass that overrides anything of it, a method set on the instance, forward hooks, a weight that changes when it is
read, or a module in training mode are refused by `problems_of`. (A subclass of torch's own modules with another forward is seen through: certify.tracing.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from certify.bound import Array, Bound
from certify.errors import Problem
from lipnet.checkpoint import first_line

Shape = tuple[int, ...]
Rule = Callable[[Any, Shape], Bound]  # (module, shape of its input without the batch) -> Bound from l2 to l2, everywhere
Head = Callable[[Any], Array]  # module -> (outputs, features) float64, the rows of a linear last layer as it runs
Index = NDArray[np.int64]
OperatorRule = Callable[["Call"], "Bound | None"]  # None for sizes and other constants
_R = TypeVar("_R", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a function or a tensor method in a forward, of which a rule says what is known."""

    name: str
    args: tuple[Any, ...]  # a Bound for each signal; other values as they are for inputs of this shape, None where they change with the batch
    options: Mapping[str, Any]
    shapes: tuple[Shape, ...]  # of the signals, in the order of the arguments
    made: Shape  # without the batch, as all shapes here; () for sizes
    picked: Callable[[], Index]  # for a rearrangement of one signal: which entry of one input each entry of one output is; see Graph.picked

    @property
    def bounds(self) -> list[Bound]:
        """Those of the signals, also where they stand in a list."""
        flat = [part for arg in self.args for part in (arg if isinstance(arg, list | tuple) else [arg])]
        return [part for part in flat if isinstance(part, Bound)]


_rules: dict[type[nn.Module], Rule] = {}
_named: dict[str, Rule] = {}  # by module and qualified name of the class
_heads: dict[type[nn.Module], Head] = {}
_operators: dict[Any, OperatorRule] = {}
_reasons: dict[Any, str] = {}  # of types, functions and names of tensor methods

IN_TRAINING = "is in training mode; call net.eval() first"
_HARMLESS = {"extra_repr", "reset_parameters", "__init__", "_abc_impl"}  # what a subclass may override without changing what it computes
_CALLING = {"__call__", "__getattr__", "__getattribute__"}


def register(*types: type[nn.Module]) -> Callable[[_R], _R]:
    """Decorator: the function bounds modules of these types. It must compute from the numbers that the module's forward uses."""

    def decorator(rule: _R) -> _R:
        _rules.update(dict.fromkeys(types, rule))
        return rule

    return decorator


def register_name(*names: str) -> Callable[[_R], _R]:
    """Decorator: as `register`, for types by module and qualified name, `"deel.torchlip.modules.activation.GroupSort"`; their package is not imported."""

    def decorator(rule: _R) -> _R:
        _named.update(dict.fromkeys(names, rule))
        return rule

    return decorator


def register_head(*types: type[nn.Module]) -> Callable[[_R], _R]:
    """Decorator: the function returns the rows of these linear modules, for tighter constants per pair of classes."""

    def decorator(head: _R) -> _R:
        _heads.update(dict.fromkeys(types, head))
        return head

    return decorator


def register_operator(*targets: Any) -> Callable[[_R], _R]:
    """Decorator: the function bounds these functions (`torch.relu`) and tensor methods (`"flatten"`) where a forward calls them."""

    def decorator(rule: _R) -> _R:
        _operators.update(dict.fromkeys(targets, rule))
        return rule

    return decorator


def register_reason(reason: str, *known: Any) -> None:
    """Say why modules of these types, these functions and these tensor methods are refused, where there is more to say than that they are unknown."""
    _reasons.update(dict.fromkeys(known, reason))


def reason_for(target: Any) -> str:
    """Why a function, or a tensor method of this name, is refused."""
    return _reasons.get(target, "no rule is known for this operation in a forward")


def known_types() -> tuple[type[nn.Module], ...]:
    """The module types with a rule."""
    return tuple(_rules)


def rule_of(cls: type[nn.Module]) -> Rule | None:
    """The rule that is registered for this very class, or None."""
    return _rules.get(cls) or _named.get(f"{cls.__module__}.{cls.__qualname__}")


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the nearest registered class, or None."""
    cls = nearest(module)
    return None if cls is None else rule_of(cls)


def head_for(module: nn.Module) -> Head | None:
    """The function that gives the rows of a linear module, or None. A class with a rule of its own may compute something else than its base's rows."""
    cls = nearest(module)
    return None if cls is None else _heads.get(cls)


def operator_for(target: Any) -> OperatorRule | None:
    """The rule of a function or of a tensor method's name, or None."""
    return _operators.get(target)


def problems_of(module: nn.Module, where: str, leaf: bool) -> list[Problem]:
    """Everything that keeps a module from being bounded by its type. A `leaf` needs a rule; the others are seen through by tracing their forward."""
    name = type(module).__name__
    found = []
    if module.training:
        found.append(IN_TRAINING)
    if module._forward_hooks or module._forward_pre_hooks or _global_hooks():
        found.append("has forward hooks, which may change its output; remove them")
    foreign = [cls for cls in type(module).__mro__[:-1] if not cls.__module__.startswith("torch.")]
    if "forward" in vars(module) or any(name in vars(cls) for cls in foreign for name in _CALLING):
        found.append("has a forward, __call__ or __getattr__ of its own on the instance or class; put it into the forward of a class")
    if leaf:
        found += _leaf_problems(module)
    elif "parametrizations" in module._modules:
        found += _computed_problems(module, nested=False)
    return [Problem(where, name, why) for why in found]


def _leaf_problems(module: nn.Module) -> list[str]:
    cls = nearest(module)
    if cls is None:
        reason = next((_reasons[c] for c in type(module).__mro__ if c in _reasons), None)
        name = type(module).__name__
        return [reason or f"no rule is known for {name}; known are {_known()}; register one with @certify.register({name})"]
    changed = sorted(_overridden(module, cls))
    if changed:
        return [f"overrides {cls.__name__}.{', '.join(changed)}, so what is known of {cls.__name__} does not hold; register a rule for {type(module).__name__}"]
    if any(not torch.isfinite(tensor).all() for tensor in module.state_dict().values()):
        return ["holds NaN or infinite numbers; load weights that are finite"]
    return _computed_problems(module, nested=True)


def _computed_problems(module: nn.Module, nested: bool) -> list[str]:
    """What is wrong with the parametrised weights of a module, and of the modules within it."""
    try:
        moving = [path for path in _moving(module) if nested or "." not in path]
    except Exception as error:  # whatever a parametrization of others raises
        line = first_line(error)
        return [f"cannot compute its own weights ({type(error).__name__}: {line}); bring it back to the dtype and device that it was made for, or load it anew"]
    if not moving:
        return []
    return [
        f"computes {', '.join(moving)} from a state that changes with every forward, in eval mode too (a power iteration that goes on, say), so no number "
        "is true of the next forward; make it a number with torch.nn.utils.parametrize.remove_parametrizations (not in a deep copy: it breaks the original)"
    ]


def nearest(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module's method resolution order by whose rule it is bounded, or None."""
    return next((cls for cls in type(module).__mro__ if rule_of(cls)), None)


@torch.no_grad()
def _moving(module: nn.Module) -> list[str]:
    """The parametrised weights that differ from one reading to the next, or that move what they are computed from when they are read."""
    found = []
    for path, part in module.named_modules():
        for name, computed in getattr(part, "parametrizations", {}).items():
            if "parametrizations." in path:  # part of the computation of another weight
                continue
            before = {key: tensor.clone() for key, tensor in computed.state_dict().items()}
            same = torch.equal(getattr(part, name).nan_to_num(), getattr(part, name).nan_to_num())
            if not same or any(not torch.equal(before[key], tensor) for key, tensor in computed.state_dict().items()):
                found.append(f"{path}.{name}".lstrip("."))
    return found


def _overridden(module: nn.Module, known: type[nn.Module]) -> set[str]:
    """Names that the known class defines and that a subclass, or the instance, replaces."""
    below = type(module).__mro__[: type(module).__mro__.index(known)]
    names = {name for cls in below for name in vars(cls)} | {name for name in vars(module) if callable(getattr(type(module), name, None))}
    return {name for name in names if hasattr(known, name) and name not in _HARMLESS and not (name.startswith("__") and name not in _CALLING)}


def _global_hooks() -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _known() -> str:
    return ", ".join(sorted(cls.__name__ for cls in _rules))
