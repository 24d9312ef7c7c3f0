"""The loop of smoothing: rows of many inputs in batches of one shape, votes added up on the device, and an input ends at the look that decides it.

A row is one noisy copy of one input. Each input takes its copies in the order of their numbers, first those that choose its class and then those of look
after look, and every stretch between two looks has counts of its own: the counts at a look are exact although later copies may be under way already, and
copies that turn out to be too many are dropped. So what is counted for an input depends on the seed, its number and the network alone, not on what else is in
a batch; the batch has one shape throughout (in one of another shape logits may differ in their last bits), its last rows being padding where nothing is left.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from certify.errors import CertifyError
from certify.smoothing.bounds import Tally
from certify.smoothing.classifier import Hardmax, Softmax, Sparsemax
from certify.smoothing.noise import SELECTION, count_rows
from certify.smoothing.noise.counts import UNIT
from certify.smoothing.schedule import Outcome, Procedure, Status

Forward = Callable[[Tensor], Tensor]  # (batch, *shape) -> (batch, classes), row by row
_IN_FLIGHT = 2  # batches whose counts may be on their way to the host


class Source(abc.ABC):
    """Draws the noisy copies. `hold` puts an input into a slot, `draw` fills a batch."""

    @abc.abstractmethod
    def hold(self, slot: int, image: Tensor) -> None:
        """Keep an input."""

    @abc.abstractmethod
    def draw(
        self,
        rows: np.ndarray,  # (batch, 3) int64: slot, stream, sample
    ) -> Tensor:  # (batch, *shape)
        """The noisy copies; rows of slot -1 are padding."""


@dataclasses.dataclass(frozen=True)
class Done:
    """What was counted for one input, and what it certifies."""

    index: int
    selection: Tally
    looks: tuple[Tally, ...]
    outcome: Outcome


@dataclasses.dataclass(eq=False)
class _Job:
    """An input that is under way."""

    index: int
    slot: int
    procedure: Procedure
    segment: int = 0  # the stretch whose copies are handed out: 0 chooses the class, j leads to look j
    taken: int = 0  # copies of it that are handed out
    complete: int = 0  # stretches that are handed out as a whole
    judged: int = 0  # looks that have been decided on
    outcome: Outcome | None = None
    over: bool = False

    def waits(self) -> bool:
        """Whether the next copies are needed only if the looks so far do not decide."""
        return self.segment > self.judged + 1


class Engine:
    """Counts copies of inputs until each is decided. `run` may be called once."""

    def __init__(
        self,
        forward: Forward,
        classes: int,
        procedure: Procedure,
        source: Source,
        batch: int,  # rows
        slots: int,  # inputs that are under way
        margin: float = 0.0,
        device: torch.device | None = None,
        shared: bool = False,  # the noise of a copy depends on its number alone
        turn: int | None = None,  # copies that an input takes before it is the turn of the next
    ) -> None:
        self.forward, self.classes, self.procedure, self.source, self.batch, self.margin = forward, classes, procedure, source, batch, margin
        self.shared, self.turn = shared, turn or batch
        self.device = device or torch.device("cpu")
        sizes = procedure.schedule.sizes
        self.lengths = (procedure.schedule.n0, sizes[0], *(b - a for a, b in itertools.pairwise(sizes)))
        self.free = list(range(slots))[::-1]
        self.jobs: list[_Job] = []
        scores = procedure.classifier.scores
        if type(scores) not in (Hardmax, Softmax, Sparsemax):
            raise CertifyError(f"the engine counts votes, softmax and sparsemax scores, not {scores!r}; use Hardmax(), Softmax(...) or Sparsemax(...)")
        self.temperature, self.sparse = getattr(scores, "temperature", None), isinstance(scores, Sparsemax)
        widths = (classes + 1,) if self.temperature is None else (classes + 1, classes, classes)  # votes; sums and squares of soft scores
        self.tables = [torch.zeros(slots * len(self.lengths), width, dtype=torch.int64, device=self.device) for width in widths]

    @torch.no_grad()
    def run(self, inputs: Iterable[tuple[int, Tensor, float]]) -> Iterator[Done]:
        """The inputs (number, placed, distance from what was given) as they are decided, in no fixed order."""
        source = iter(inputs)
        pending: collections.deque[tuple[torch.cuda.Event | None, list[Tensor], list[tuple[_Job, int]]]] = collections.deque()
        while True:
            planned = self._plan(source)
            if planned is None and not pending:
                return
            if planned is not None:
                self._count(*planned)
                pending.append(self._read())
            while pending and (len(pending) > _IN_FLIGHT or planned is None or pending[0][0] is None or pending[0][0].query()):
                event, host, jobs = pending.popleft()
                if event is not None:
                    event.synchronize()
                yield from self._judge(host, jobs)

    def _plan(self, source: Iterator[tuple[int, Tensor, float]]) -> tuple[np.ndarray, np.ndarray] | None:
        """The next rows, and where each is counted: first what is sure to be needed, then new inputs, then what may be needed. None: nothing is left."""
        parts: list[tuple[_Job, int, int, int]] = []  # job, segment, first copy, count
        left = self._round(self.batch, parts, ahead=False)
        while left and self.free and (found := next(source, None)) is not None:
            job = _Job(found[0], self.free.pop(), self.procedure.around(found[2]))
            self.source.hold(job.slot, found[1])
            for table in self.tables:
                table[job.slot * len(self.lengths) : (job.slot + 1) * len(self.lengths)].zero_()
            self.jobs.append(job)
            left = self._one_turn(job, left, parts, ahead=False)
        for ahead in (False, True):
            before = left + 1
            while 0 < left < before:
                before, left = left, self._round(left, parts, ahead)
        if not parts:
            return None
        rows, places, start = np.zeros((self.batch, 3), dtype=np.int64), np.zeros((self.batch, 3), dtype=np.int64), 0
        rows[:, 0] = places[:, 0] = -1  # padding, unless there is more
        for job, segment, first, count in parts:
            part = slice(start, start + count)
            rows[part, 0], rows[part, 1] = job.slot, 0 if self.shared else job.index
            rows[part, 2] = np.arange(count) + self._sample(segment, first)
            places[part, 0] = job.slot * len(self.lengths) + segment
            start += count
        return rows, places

    def _sample(self, segment: int, first: int) -> int:
        """The number of a copy: those that choose the class are apart from all others."""
        return SELECTION + first if segment == 0 else sum(self.lengths[1:segment]) + first

    def _round(self, left: int, parts: list[tuple[_Job, int, int, int]], ahead: bool) -> int:
        """A turn of every job; returns the room that is left."""
        for job in self.jobs:
            left = self._one_turn(job, left, parts, ahead)
        return left

    def _one_turn(self, job: _Job, left: int, parts: list[tuple[_Job, int, int, int]], ahead: bool) -> int:
        room = min(left, self.turn)
        return left - room + self._take(job, room, parts, ahead)

    def _take(self, job: _Job, left: int, parts: list[tuple[_Job, int, int, int]], ahead: bool) -> int:
        """Hand out copies of a job while there is room; returns the room that is left."""
        while left and not job.over and job.segment < len(self.lengths) and (ahead or not job.waits()):
            count = min(left, self.lengths[job.segment] - job.taken)
            parts.append((job, job.segment, job.taken, count))
            job.taken, left = job.taken + count, left - count
            if job.taken == self.lengths[job.segment]:
                job.segment, job.taken, job.complete = job.segment + 1, 0, job.complete + 1
        return left

    def _count(self, rows: np.ndarray, places: np.ndarray) -> None:
        """One batch through the network, and its votes into the table."""
        logits = self.forward(self.source.draw(rows))
        if logits.shape != (self.batch, self.classes):
            raise CertifyError(
                f"the network returns {tuple(logits.shape)} for {self.batch} inputs, expected ({self.batch}, {self.classes}); it must be row by row"
            )
        where = torch.from_numpy(places).to(self.device, non_blocking=True)
        if self.temperature is None:
            count_rows(logits, where, self.tables[0], margin=self.margin)
        else:
            votes, sums, squares = self.tables
            count_rows(logits, where, votes, margin=self.margin, sums=sums, squares=squares, temperature=self.temperature, sparse=self.sparse)

    def _read(self) -> tuple[torch.cuda.Event | None, list[Tensor], list[tuple[_Job, int]]]:
        """The tables as they are after the batches so far, on their way to the host, and how many stretches of which jobs are complete in them."""
        jobs = [(job, job.complete) for job in self.jobs if job.complete - 1 > job.judged]
        if self.device.type == "cpu":
            return None, self.tables, jobs
        host = [torch.empty(table.shape, dtype=torch.int64, pin_memory=True).copy_(table, non_blocking=True) for table in self.tables]
        event = torch.cuda.Event()
        event.record()
        return event, host, jobs

    def _judge(self, tables: list[Tensor], jobs: list[tuple[_Job, int]]) -> Iterator[Done]:
        """Decide on every look that is complete."""
        for job, complete in jobs:
            if job.over:
                continue
            first = job.slot * len(self.lengths)
            counts = [table[first : first + complete].numpy() for table in tables]
            selection = _tally(self.lengths[0], [part[0] for part in counts])
            sums = [part[1:].cumsum(axis=0) for part in counts]
            looks = tuple(_tally(n, [part[j] for part in sums]) for j, n in enumerate(self.procedure.schedule.sizes[: complete - 1]))
            while job.judged < len(looks) and not job.over:
                job.judged += 1
                job.outcome = job.procedure.decide(selection, looks[: job.judged], job.outcome)
                job.over = job.outcome.status is not Status.UNFINISHED
            if job.over and job.outcome is not None:
                self.jobs.remove(job)
                self.free.append(job.slot)
                yield Done(job.index, selection, looks[: job.judged], job.outcome)


def _tally(n: int, counts: list[np.ndarray]) -> Tally:
    """Of one row of each table."""
    undecided = np.asarray(counts[0][-1])
    if len(counts) == 1:
        return Tally(n, counts[0][:-1].copy(), undecided=undecided)
    return Tally(n, counts[1].copy(), -(-counts[2] // UNIT), undecided=undecided, unit=UNIT)  # squares rounded up
