"""How long the steps of a run took, and for how much of that time ranks computed; all times are passed in."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from lightning_hetero.planning.reports import MeasuredStep

KEPT_STEPS = 25
"""Steps whose times are kept. Chosen: far more than reports lag behind, and a few disturbed ones don't matter."""


@dataclass(frozen=True)
class SplitSteps:
    """W local batches, and the seconds of the most recent steps with them."""

    local_batches: tuple[int, ...]
    seconds: deque[float]


class StepStatistics:
    """Joins the wall time of each step with the ranks' compute times, which become known some steps later.

    With gradient accumulation all values are means over the micro-batches of an optimizer step. The very first step is
    left out: it includes lazy initialization.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._micro_batches: list[float] = []
        self._initialized = False
        self._seconds: dict[int, float] = {}  # wall time by step, until all ranks have measured it
        self._new: list[tuple[float, float]] = []  # wall and mean compute seconds, since the last `averages`
        self.splits: tuple[SplitSteps, ...] = ()
        """The first and the latest split: only one until it changes, none before a step is measured."""

    def begin(self, now: float) -> None:
        """A batch is about to be fetched, at `now` seconds; after a pause, the step begins here."""
        if self._begun is None:
            self._begun = now

    def pause(self) -> None:
        """Whatever happens until the next batch is fetched is not part of a step: validation, a checkpoint."""
        self._begun = None

    def end(self, now: float, step: int, *, stepped: bool) -> None:
        """Training step `step` is over at `now` seconds; `stepped`: the optimizer has stepped."""
        if self._begun is not None:
            self._micro_batches.append(now - self._begun)
        self._begun = now
        if stepped and self._micro_batches:
            if self._initialized:
                self._seconds[step] = fmean(self._micro_batches)
            self._initialized, self._micro_batches = True, []
        if len(self._seconds) > KEPT_STEPS:
            del self._seconds[min(self._seconds)]

    def update(self, measured: Iterable[MeasuredStep]) -> None:
        """Record steps that all ranks have measured, oldest first."""
        for step in measured:
            if (seconds := self._seconds.pop(step.step, None)) is None:
                continue
            self._new.append((seconds, fmean(step.compute_seconds)))
            if not self.splits or self.splits[-1].local_batches != step.local_batches:
                self.splits = (*self.splits[:1], SplitSteps(step.local_batches, deque(maxlen=KEPT_STEPS)))
            self.splits[-1].seconds.append(seconds)

    def averages(self) -> tuple[float, float] | None:
        """Mean seconds of the steps since the last call, and the fraction in which ranks were idle; None if none."""
        new, self._new = self._new, []
        if not new:
            return None
        seconds, compute = map(fmean, zip(*new, strict=True))
        return seconds, max(0.0, 1 - compute / seconds)
