"""`fit`: one training loop for networks with a known constant; a `Recipe` is what it does, a folder lets it go on after it was stopped.

The certified accuracy that it reports along the way is by the constant that the layers declare; `certify` is what proves one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn

from lipnet import checkpoint
from lipnet.augment import Augmentation
from lipnet.layers import Normalize, Scale, UnitRowLinear
from lipnet.layers.base import Layer, check_sizes
from lipnet.losses import EMMA, LogitAnnealing, OffsetCrossEntropy, emma_epsilon, pair_constants
from lipnet.optim import Lookahead, warmup_cosine

if torch.distributed.is_available():
    # Its functions have the process group that exists when it is imported as a default. The first step of an optimizer imports it too late: the group then
    # outlives destroy_process_group, and its threads abort the process at exit.
    import torch.distributed.nn.functional

STATE = "training.state"  # in the folder: the line below, the sha256 of what follows, and tensors and numbers as torch.save writes them
_MAGIC = b"lipnet training state 1\n"
_EVALUATED_AT_ONCE = 1024
_HASHED_IMAGES = 256
_ONE_LIPSCHITZ = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelUnshuffle, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softsign,
)  # fmt: skip

Constants = Callable[[nn.Module], Tensor]


@dataclasses.dataclass(frozen=True)
class EpsilonSchedule:
    """The radius that EMMA asks for: `low` to `high` times `epsilon`, linear in the epoch, reached half-way (`emma_epsilon`)."""

    epsilon: float = 36 / 255
    low: float = 0.1
    high: float = 3.0

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and 0 < self.low <= self.high < math.inf):
            raise ValueError(f"the schedule needs epsilon > 0 and 0 < low <= high, got {self}")

    def at(self, progress: float) -> float:
        """The radius at a fraction of the training."""
        return emma_epsilon(progress, self.epsilon, self.low, self.high)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Recipe:
    """How to train, as values; it prints itself, and two that print the same are equal.

    `epsilon` is set on the EMMA within `loss` before each epoch (on a copy: the recipe stays as it is). `clip` bounds the norm of the gradient. After
    `warmup_epochs` the learning rate follows a cosine to 0. `precision="bfloat16"` runs the forward pass under autocast; weights are made in float32 all the
    same, and what is reported and certified is the network in the precision of its parameters.
    Optimiser, learning rate and Lookahead are those of BRONet, for hundreds of epochs. For few, more rate and no Lookahead do better: three sandwich layers
    on MNIST in 6 epochs reach 0.74 certified at radius 1 with 1e-3 and Lookahead, 0.81 with 5e-3 and none.
    """

    epochs: int = 100
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    clip: float | None = None
    optimizer: Literal["nadam", "adam"] = "nadam"
    lookahead: bool = True
    loss: nn.Module = dataclasses.field(default_factory=OffsetCrossEntropy)
    epsilon: EpsilonSchedule | None = None
    augment: Sequence[Augmentation] = ()
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_sizes(epochs=self.epochs, batch=self.batch)
        object.__setattr__(self, "augment", tuple(self.augment))
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(f"learning_rate must be positive and weight_decay not negative, got {self.learning_rate} and {self.weight_decay}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be in [0, epochs), got {self.warmup_epochs} of {self.epochs}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip}")
        for name, value, known in (("optimizer", self.optimizer, ("nadam", "adam")), ("precision", self.precision, ("float32", "bfloat16"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not all(isinstance(step, Augmentation) for step in self.augment):
            raise ValueError(f"augment must hold values such as Crop() and Flip(), got {self.augment}")
        if not isinstance(self.loss, nn.Module) or getattr(self.loss, "reduction", "mean") != "mean":
            raise ValueError(f"loss must be a module that returns the mean over a batch, such as lipnet.EMMA(), got {_described(self.loss)}")
        if self.epsilon is not None and not _emmas(self.loss):
            raise ValueError(f"epsilon is a schedule for EMMA, and there is none in {_described(self.loss)}; leave it out, or use a loss with EMMA")

    def __repr__(self) -> str:
        return f"Recipe({', '.join(f'{field.name}={_described(getattr(self, field.name))}' for field in dataclasses.fields(self))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """One epoch: the mean training loss, and what it gives on the validation set (None and () without one).

    `certified` is the accuracy by margin and declared constant at each of the radii; `certify` proves one.
    """

    epoch: int  # 1, 2, ...
    epochs: int
    loss: float
    clean: float | None
    certified: tuple[float, ...]
    radii: tuple[float, ...]
    learning_rate: float  # of the first batch
    epsilon: float | None  # that EMMA asked for
    seconds: float

    def __str__(self) -> str:
        accuracies = "" if self.clean is None else f"  clean {self.clean:.4f}"
        accuracies += "".join(f"  at {radius:.4g} {accuracy:.4f}" for radius, accuracy in zip(self.radii, self.certified, strict=True))
        return f"epoch {self.epoch}/{self.epochs}  loss {self.loss:.4g}{accuracies}  rate {self.learning_rate:.3g}  {self.seconds:.1f} s"


@dataclasses.dataclass(frozen=True)
class History:
    """The report of every epoch, also of those before a training was resumed."""

    reports: tuple[EpochReport, ...]

    @property
    def last(self) -> EpochReport:
        """The report of the last epoch."""
        return self.reports[-1]


def print_progress(report: EpochReport) -> None:
    """One line for each epoch, to stderr: a value for `progress`."""
    sys.stderr.write(f"{report}\n")
    sys.stderr.flush()


def declared_constants(net: nn.Module) -> Tensor:  # (classes, classes)
    """The pair constants of an `nn.Sequential` that ends in a linear layer, from what its layers declare; differentiable, not proved.

    `features |w_i - w_j|`: features is the product of `factor` of Scale, `1 / min(std)` of Normalize, `lipschitz` of a residual block and `constant()` of
    a layer that has one; every other layer of lipnet counts as 1. What is no layer of lipnet and not plainly 1-Lipschitz is refused.
    """
    parts = list(_flat(net))
    head = parts.pop() if type(net) is nn.Sequential and parts else None
    found = getattr(head, "weight", None) if isinstance(head, Layer) or type(head) is nn.Linear else None
    weight = found() if callable(found) and not isinstance(found, Tensor) else found
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        what = type(net if head is None else head).__name__
        raise ValueError(f"pair constants are known for an nn.Sequential that ends in UnitRowLinear or another linear layer, not in {what}; pass constants=")
    features: float | Tensor = 1.0
    for part in parts:
        features = features * _declared(part)
    return pair_constants(weight, features)


def fit(
    net: nn.Module,
    images: Tensor,  # (N, ...) uint8, taken as k / 255, or floats, taken as they are
    labels: Tensor,  # (N,) whole numbers
    recipe: Recipe,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    radii: Sequence[float] = (36 / 255,),
    constants: Constants | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: Callable[[EpochReport], None] | None = None,
) -> History:
    """Train `net` in place, on its own device or on `device`; it ends in eval mode, and saving it is left to the caller.

    After every epoch `progress` gets the clean and the certified accuracy on `validation`: margins against the pair constants that the loss is given too, by
    default `declared_constants`. These constants are declared; `certify` proves the ones that hold. Without validation nothing is evaluated.

    The order of the images, their augmentation and dropout follow from `seed`. With a `folder` the state is kept there after every epoch, and a training
    that was stopped at any time goes on from it: on the CPU with one thread it ends in the same bits as one that was not stopped. A state of another recipe,
    network, data or seed is refused (`resume=False` begins anew), and so is a damaged one (`CheckpointError`). Nothing in a state is executed.

    Under torchrun (an initialised process group) every rank calls `fit` with the same arguments: it takes its share of every batch and of the validation
    set, gradients are added up, and rank 0 alone writes and reports. The folder must be the same one for all.

    Raises RuntimeError when the loss or a parameter is no longer finite; the state of the epoch before stays in the folder.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a value such as lipnet.Recipe(epochs=10), got {recipe!r:.80}")
    device = _usable(device) if device is not None else next((p.device for p in net.parameters()), torch.device("cpu"))
    _check_data("images", images, labels, recipe)
    if validation is not None:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise ValueError(f"validation must be a pair, images and labels, got {type(validation).__name__}")
        _check_data("validation images", *validation, recipe)
    if not isinstance(radii, Sequence) or not all(0 <= radius < math.inf for radius in radii):
        raise ValueError(f"radii must be finite and not negative, in a sequence, got {radii!r:.80}")
    if not callable(progress) and progress is not None:
        raise ValueError(f"progress must be a function of an EpochReport, such as lipnet.print_progress, got {progress!r:.80}")
    run = _Run(net.to(device), recipe, constants or declared_constants, device, seed, math.ceil(len(images) / recipe.batch))
    radii = tuple(float(radius) for radius in radii) if validation is not None else ()
    _check_net(run, images, [labels] if validation is None else [labels, validation[1]], bool(radii))

    about = {"recipe": repr(recipe), "seed": str(seed), "network": _network_digest(net), "data": _data_digest(images, labels)}
    path = None if folder is None else pathlib.Path(folder) / STATE
    if path is not None and resume and path.exists():
        run.restore(_read_state(path, about))
    _synchronize(net, len(run.reports))
    if path is not None and _rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(run.reports), recipe.epochs):
        start = time.perf_counter()
        epsilon = run.schedule_epsilon(epoch)
        rate = float(run.optimizer.param_groups[0]["lr"])
        loss = run.train(images, labels, epoch)
        clean, certified = run.evaluate(*validation, radii) if validation is not None else (None, ())
        report = EpochReport(epoch + 1, recipe.epochs, loss, clean, certified, radii, rate, epsilon, time.perf_counter() - start)
        run.reports.append(report)
        if path is not None and _rank() == 0:
            _write_state(path, about, run.state())
        if progress is not None and _rank() == 0:
            progress(report)
    net.eval()
    return History(tuple(run.reports))


def _usable(device: torch.device | str) -> torch.device:
    """A device on which tensors can be made here."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"torch cannot use the device {str(device)!r} here ({checkpoint.first_line(error)}); leave device out, or take 'cpu'") from None


class _Run:
    """A training between two epochs: all that changes in it."""

    def __init__(self, net: nn.Module, recipe: Recipe, constants: Constants, device: torch.device, seed: int, batches: int) -> None:
        self.net, self.recipe, self.constants, self.device = net, recipe, constants, device
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("the network has no parameters to train, got none that requires a gradient")
        self.dtype = next((p.dtype for p in self.parameters if p.is_floating_point()), torch.float32)
        make = torch.optim.NAdam if recipe.optimizer == "nadam" else torch.optim.Adam
        inner = make(self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.optimizer: torch.optim.Optimizer = Lookahead(inner) if recipe.lookahead else inner
        self.schedule = warmup_cosine(self.optimizer, min(round(recipe.warmup_epochs * batches), recipe.epochs * batches - 1), recipe.epochs * batches)
        self.loss = copy.deepcopy(recipe.loss).to(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.reports: list[EpochReport] = []

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings in lists and dicts."""
        return {
            "net": dict(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "reports": [dataclasses.astuple(report) for report in self.reports],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as the run that gave this state."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.reports = [EpochReport(*values) for values in state["reports"]]

    def schedule_epsilon(self, epoch: int) -> float | None:
        """Tell the loss the radius of this epoch; returns it, if the loss has one."""
        emmas = _emmas(self.loss)
        if self.recipe.epsilon is not None:
            for emma in emmas:
                emma.epsilon = self.recipe.epsilon.at(epoch / self.recipe.epochs)
        return float(emmas[0].epsilon) if emmas else None

    def train(self, images: Tensor, labels: Tensor, epoch: int) -> float:
        """One pass over the images; returns the mean loss."""
        self.net.train()
        order = torch.randperm(len(images), generator=self.generator)
        noise = int(torch.randint(2**62, (), generator=self.generator))  # of dropout and the like, which draw from torch's global generators
        total = 0.0
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(noise + _rank())
            for step, rows in enumerate(order.split(self.recipe.batch)):
                loss = self._step(images, labels, rows)
                if not math.isfinite(loss):
                    raise RuntimeError(f"the loss is {loss} at batch {step + 1} of epoch {epoch + 1}; lower the learning rate, or set clip{self._kept()}")
                total += loss * len(rows)
        _average_buffers(self.net)
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            raise RuntimeError(f"a parameter is no longer finite after epoch {epoch + 1}; lower the learning rate, or set clip{self._kept()}")
        return total / len(images)

    def _kept(self) -> str:
        return f" (the state after epoch {len(self.reports)} is kept, where there is a folder)" if self.reports else ""

    def _step(self, images: Tensor, labels: Tensor, rows: Tensor) -> float:
        """One batch, of which this rank does its share; returns the mean loss of the whole batch."""
        drawn = [augmentation.draw(len(rows), self.generator) for augmentation in self.recipe.augment]
        share = slice(_rank(), None, _ranks())
        mine = rows[share]
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        if len(mine):
            x, y = self._batch(images, mine), labels[mine.to(labels.device)].to(self.device, torch.int64)
            for augmentation, numbers in zip(self.recipe.augment, drawn, strict=True):
                x = augmentation.apply(x, numbers[share])
            loss = self._loss(x, y) * (len(mine) / len(rows))
            loss.backward()
        mean = _add_up(self.parameters, loss.detach())
        if math.isfinite(mean):
            if self.recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
            self.optimizer.step()
            self.schedule.step()
        return mean

    def _batch(self, images: Tensor, rows: Tensor) -> Tensor:
        x = images[rows.to(images.device)].to(self.device)
        return x.to(self.dtype) / 255 if x.dtype == torch.uint8 else x.to(self.dtype)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if half else contextlib.nullcontext():
            logits = self.net(x)
        loss = self.loss(logits.to(self.dtype), y, *([self.constants(self.net)] if takes_constants(self.loss) else []))
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(f"loss must return one number, the mean over the batch; {_described(self.loss)} returned {getattr(loss, 'shape', loss)}")
        return loss

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor, radii: Sequence[float]) -> tuple[float, tuple[float, ...]]:
        """The accuracy, and the accuracy at each radius r: `z_t - z_j > r K_tj` for all j but the label t."""
        self.net.eval()
        constants = self.constants(self.net) if radii else None
        counts = torch.zeros(1 + len(radii), dtype=torch.float64, device=self.device)
        for rows in torch.arange(_rank(), len(images), _ranks()).split(_EVALUATED_AT_ONCE):
            z, y = self.net(self._batch(images, rows)), labels[rows.to(labels.device)].to(self.device, torch.int64)
            counts[0] += (z.argmax(1) == y).sum()
            for i, radius in enumerate(radii):
                assert constants is not None
                margins = z.gather(1, y[:, None]) - z - radius * constants[y]
                counts[1 + i] += (margins > 0).scatter(1, y[:, None], True).all(1).sum()
        if _ranks() > 1:
            torch.distributed.all_reduce(counts)
        clean, *certified = (counts / len(images)).tolist()
        return clean, tuple(certified)


def takes_constants(loss: nn.Module) -> bool:
    """Whether the loss is to be given pair constants: its forward has an argument of that name, and uses it."""
    unused = isinstance(loss, LogitAnnealing) and loss.emma is None
    return "constants" in inspect.signature(loss.forward).parameters and not unused


def _emmas(loss: nn.Module) -> list[EMMA]:
    return [module for module in loss.modules() if isinstance(module, EMMA)]


def _described(value: Any) -> str:
    """A value as the call that makes it; of a module those arguments of its constructor that it keeps as attributes."""
    if isinstance(value, Tensor):
        return f"tensor({value.tolist()})"
    if not isinstance(value, nn.Module):
        return repr(value)
    names = [name for name in inspect.signature(type(value)).parameters if hasattr(value, name)]
    return f"{type(value).__name__}({', '.join(f'{name}={_described(getattr(value, name))}' for name in names)})"


def _flat(net: nn.Module) -> Iterable[nn.Module]:
    """The modules of nested nn.Sequential, one after the other."""
    if type(net) is nn.Sequential:
        for child in net:
            yield from _flat(child)
    else:
        yield net


def _declared(module: nn.Module) -> float | Tensor:
    """The Lipschitz constant that a module before the head says it has."""
    if isinstance(module, Scale):
        return module.factor
    if isinstance(module, Normalize):
        return 1 / min(module.std)
    if isinstance(module, Layer) and not isinstance(module, UnitRowLinear):
        constant = getattr(module, "constant", None)
        if callable(constant):
            found: float | Tensor = constant()
            return found
        return float(getattr(module, "lipschitz", 1.0))
    if type(module) in _ONE_LIPSCHITZ:
        return 1.0
    raise ValueError(f"{type(module).__name__} before the last layer declares no Lipschitz constant; use a layer of lipnet, or pass constants=")


def _check_data(what: str, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Refuse what cannot be trained on, naming what was found."""
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        found = f"{type(images).__name__} and {type(labels).__name__}"
        raise ValueError(f"{what} and their labels must be tensors, got {found}; torch.from_numpy makes them of arrays")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{what} must be uint8 or floating-point numbers, got {images.dtype}")
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"the labels of {what} must be one whole number each, (N,), got {tuple(labels.shape)} of {labels.dtype}")
    if images.dim() < 2 or not len(images):
        raise ValueError(f"{what} must be at least one, (N, ...), got {tuple(images.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} {what} and {len(labels)} labels; give one label for each")
    if recipe.augment and images.dim() != 4:
        raise ValueError(f"{recipe.augment[0]} needs images (N, C, H, W), got {tuple(images.shape)}; put an nn.Flatten into the network instead")


def _check_net(run: _Run, images: Tensor, labels: Sequence[Tensor], certifies: bool) -> None:
    """One image through the network: refuse labels that it has no logit for, and constants that do not fit."""
    with torch.no_grad():
        image = run._batch(images, torch.zeros(1, dtype=torch.int64))
        try:
            logits = run.net.eval()(image)
        except RuntimeError as error:
            raise ValueError(f"the network does not take images of shape {tuple(image.shape[1:])}: {checkpoint.first_line(error)}") from error
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"a classifier returns (batch, classes) with at least two classes, this network returns {tuple(logits.shape)} for one image")
        classes = logits.shape[1]
        for some in labels:
            if some.min() < 0 or some.max() >= classes:
                raise ValueError(f"labels must be in 0..{classes - 1}, one for each logit, got {int(some.min())}..{int(some.max())}")
        if takes_constants(run.loss) or certifies:
            constants = run.constants(run.net)
            if constants.shape != (classes, classes):
                raise ValueError(f"constants must be (classes, classes) = {(classes, classes)}, got {tuple(constants.shape)}")


def _network_digest(net: nn.Module) -> str:
    """sha256 of names, dtypes and shapes, not of the values: these are what a training changes."""
    return hashlib.sha256("".join(f"{name} {t.dtype} {tuple(t.shape)}\n" for name, t in net.state_dict().items()).encode()).hexdigest()


def _data_digest(images: Tensor, labels: Tensor) -> str:
    """sha256 of the shapes, of all labels, and of 256 images evenly spread."""
    some = torch.linspace(0, len(images) - 1, min(_HASHED_IMAGES, len(images))).long()
    hasher = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for tensor in (images[some.to(images.device)], labels.to(torch.int64)):
        hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _write_state(path: pathlib.Path, about: Mapping[str, str], state: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({"about": dict(about), **state}, buffer)
    payload = buffer.getvalue()
    checkpoint.write_atomically(path, _MAGIC + hashlib.sha256(payload).digest() + payload)


def _read_state(path: pathlib.Path, about: Mapping[str, str]) -> dict[str, Any]:
    """The state of a whole file of this very training."""
    anew = "move it away, or pass resume=False to begin anew"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise checkpoint.CheckpointError(f"{path}: cannot be read ({error.strerror}); {anew}") from error
    start = len(_MAGIC) + 32
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(data[start:]).digest() != data[len(_MAGIC) : start]:
        raise checkpoint.CheckpointError(f"{path}: this is not the state of a training, or it is damaged or cut off; {anew}")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data[start:]), map_location="cpu", weights_only=True)
        found = state["about"]
        changed = [name for name, value in about.items() if found[name] != value]
    except Exception as error:  # whatever torch makes of a file that somebody else wrote
        raise checkpoint.CheckpointError(f"{path}: the state cannot be followed ({checkpoint.first_line(error)}); {anew}") from error
    if changed:
        was = f" (its recipe: {found['recipe']})" if "recipe" in changed else ""
        raise ValueError(f"{path.parent}: holds a training with another {' and another '.join(changed)}{was}; give another folder, or {anew}")
    return state


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


@torch.no_grad()
def _synchronize(net: nn.Module, epochs: int) -> None:
    """All ranks start from the parameters of rank 0, after the same number of epochs."""
    if _ranks() == 1:
        return
    where = next(net.parameters()).device
    found = [torch.zeros((), dtype=torch.int64, device=where) for _ in range(_ranks())]
    torch.distributed.all_gather(found, torch.tensor(epochs, device=where))
    if len({int(number) for number in found}) > 1:
        raise RuntimeError(f"the ranks found states after {[int(number) for number in found]} epochs; give all of them the same folder, on a shared disk")
    for tensor in net.state_dict().values():
        torch.distributed.broadcast(tensor, 0)


def _add_up(parameters: Sequence[nn.Parameter], loss: Tensor) -> float:
    """Gradients and the loss become their sums over the ranks, in one message; a parameter that has no gradient on any rank keeps none."""
    if _ranks() == 1:
        return float(loss)
    has = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
    flat = torch.cat([*((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters), has, loss.reshape(1)])
    torch.distributed.all_reduce(flat)
    *gradients, has, total = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
    for parameter, gradient, any_ in zip(parameters, gradients, has.tolist(), strict=True):
        parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype) if any_ else None
    return float(total)


@torch.no_grad()
def _average_buffers(net: nn.Module) -> None:
    """Running statistics become their mean over the ranks; a buffer that is the same everywhere keeps its bits."""
    if _ranks() == 1:
        return
    for buffer in net.buffers():
        if buffer.is_floating_point():
            found = [torch.empty_like(buffer) for _ in range(_ranks())]
            torch.distributed.all_gather(found, buffer)
            if any(not torch.equal(other, found[0]) for other in found[1:]):
                buffer.copy_(torch.stack(found).mean(0))
