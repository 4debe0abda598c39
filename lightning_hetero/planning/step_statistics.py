"""What the first rank has seen of a run: how long steps took, and how long each rank worked in them.

Pure: times and numbers are handed in.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median


@dataclass(frozen=True)
class Pace:
    """Steps of a full global batch, on average.

    Attributes:
        seconds: from the end of a step to the end of the next one.
        idle: the part of it in which ranks, on average, waited for others; in [0, 1).
    """

    seconds: float
    idle: float


class StepStatistics:
    """Joins the seconds of steps with the ranks' own work in them, which is told some steps later.

    With gradient accumulation everything is the mean of a micro-batch, up to each optimizer step.

    Args:
        world_size: W.
    """

    PATIENCE = 64
    """Steps after which what not all ranks have told of is given up."""

    LATEST = 25
    """Steps that the end of a run is judged by."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._since: float | None = None
        self._batches: list[float] = []
        self._walls: dict[int, tuple[float, tuple[int, ...]]] = {}  # by step, until its own work is known
        self._told: dict[int, dict[int, float]] = {}
        self._first: int | None = None
        self._steps, self._seconds, self._own = 0, 0.0, 0.0  # since they were last asked for
        self._moved = False
        self._early: list[float] = []
        self._latest: deque[float] = deque(maxlen=self.LATEST)
        self.first_split: tuple[int, ...] = ()
        """The split of the first measured step; empty before there is one."""
        self.split: tuple[int, ...] = ()
        """The split of the last measured step."""
        self.settled = 0
        """Steps measured in a row at that split."""

    def begin(self, now: float) -> None:
        """A batch is about to be fetched, at `now` seconds; only after a pause the step begins here."""
        if self._since is None:
            self._since = now

    def pause(self) -> None:
        """What comes until the next batch is fetched is no part of a step: validation, a checkpoint."""
        self._since = None

    def end(self, now: float, step: int, split: tuple[int, ...], *, stepped: bool) -> None:
        """A training step is over.

        Args:
            now: seconds on the clock of `begin`.
            step: the global batch.
            split: W samples, those of a full global batch in this step.
            stepped: the optimizer has made its step.
        """
        if self._since is not None:
            self._batches.append(now - self._since)
        self._since = now
        if not stepped or not self._batches:
            return
        if self._first is None:  # it measures lazy initialisation
            self._first = step
        else:
            self._walls[step] = (fmean(self._batches), split)
        self._batches = []
        for old in [old for old in self._walls if old < step - self.PATIENCE]:
            del self._walls[old]

    def update(self, steps: Sequence[int], seconds: Sequence[float]) -> None:
        """Take in W ranks' own seconds, each of the step that it tells of; -1 for none. Only full batches are told."""
        for rank, (step, own) in enumerate(zip(steps, seconds, strict=True)):
            if step >= 0:
                self._told.setdefault(step, {})[rank] = own
        for step in [step for step, told in self._told.items() if len(told) == self._world_size]:
            own = fmean(self._told.pop(step).values())
            if step in self._walls:
                self._join(*self._walls.pop(step), own)
        for step in [step for step in self._told if step < max(steps) - self.PATIENCE]:
            del self._told[step]

    def pace(self) -> Pace | None:
        """The steps that have become known since this was last called; None if there are none."""
        steps, seconds, own = self._steps, self._seconds, self._own
        self._steps, self._seconds, self._own = 0, 0.0, 0.0
        return Pace(seconds / steps, max(0.0, 1 - own / seconds)) if steps else None

    def early_seconds(self) -> float | None:
        """Median of the steps at the first split, before it was left for another; the very first step is left out."""
        return median(self._early) if self._early else None

    def latest_seconds(self) -> float | None:
        """Median of the last steps, all at the last split."""
        return median(self._latest) if self._latest else None

    def _join(self, seconds: float, split: tuple[int, ...], own: float) -> None:
        self._steps, self._seconds, self._own = self._steps + 1, self._seconds + seconds, self._own + own
        self.first_split = self.first_split or split
        self._moved = self._moved or split != self.first_split
        if not self._moved and len(self._early) < self.LATEST:
            self._early.append(seconds)
        if split != self.split:
            self.split, self.settled = split, 0
            self._latest.clear()
        self.settled += 1
        self._latest.append(seconds)
