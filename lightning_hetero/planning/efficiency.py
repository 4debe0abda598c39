"""What step-time models predict for all ranks together: which ranks make steps faster, and how fast steps could be."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_hetero.planning.allocation import allocate
from lightning_hetero.planning.step_time import StepTimeModel

MARGIN = 0.02
"""The part of a step that leaving ranks out has to save. Chosen: models are off by about as much."""

LARGEST_FACTOR = 64
"""Global batches up to this many times the current one are searched. Chosen: what a user may still consider."""


@dataclass(frozen=True)
class EfficiencyModel:
    """Predicts the step time of all ranks, or of a subset, at any global batch.

    Every rank that takes part needs its fixed time in each step: at a small global batch the others are faster without
    it. Exposed communication is what each rank adds to a step if it finishes last, unless it computes alone. The limits
    on local batches are those of `allocate`, in multiples of the granularity.
    """

    models: Sequence[StepTimeModel]
    exposed_communication: Sequence[float]
    minimum: int = 1
    granularity: int = 1
    maximum: Sequence[int] | None = None

    @cached_property
    def _last(self) -> tuple[StepTimeModel, ...]:
        """W models of the step time if that rank finishes last; a local batch below the minimum takes as long as it."""
        pairs = zip(self.models, self.exposed_communication, strict=True)
        return tuple(_flat_up_to(self.minimum, model.scaled(1, plus=seconds)) for model, seconds in pairs)

    @cached_property
    def shortest_seconds(self) -> tuple[float, ...]:
        """W seconds: the shortest step that each rank can take part in, with its minimum local batch."""
        return tuple(model.seconds(self.minimum) for model in self._last)

    def split_seconds(self, local_batches: Sequence[int]) -> float:
        """Seconds of a step of all ranks with these W local batches."""
        return max(model.seconds(b) for model, b in zip(self._last, local_batches, strict=True))

    def step_seconds(self, global_batch: int, ranks: Sequence[int], minimum: int | None = None) -> float:
        """Seconds of a step of only these ranks, at the best split; infinite if their limits don't allow it."""
        maximum = None if self.maximum is None else [self.maximum[rank] for rank in ranks]
        if not ranks or (maximum is not None and sum(maximum) < global_batch):
            return math.inf
        if len(ranks) == 1:
            return self.models[ranks[0]].seconds(global_batch)
        last, minimum = [self._last[rank] for rank in ranks], self.minimum if minimum is None else minimum
        split = allocate(last, global_batch, minimum=minimum, maximum=maximum, granularity=self.granularity)
        return max(model.seconds(b) for model, b in zip(last, split, strict=True) if b > 0)

    def paying(self, global_batch: int) -> tuple[int, ...]:
        """The ranks that pay: all of them, unless a step is faster without some of them by more than `MARGIN`.

        A rank does not pay if its minimum local batch alone takes longer than a whole step of the fastest ranks, by
        more than `MARGIN`. Such ranks are left out together: leaving out one of two equal ones would gain nothing.
        """
        ranks = range(len(self.models))
        alone, alone_seconds = min(((r, self.step_seconds(global_batch, [r])) for r in ranks), key=lambda pair: pair[1])
        # With a minimum of 0, the best split gives nothing to a rank that would make the step longer.
        limit = (1 + MARGIN) * min(alone_seconds, self.step_seconds(global_batch, ranks, minimum=0))
        kept = tuple(rank for rank in ranks if self.shortest_seconds[rank] <= limit)
        seconds = self.step_seconds(global_batch, kept)
        if seconds > limit:  # one rank alone is faster still: it does not communicate
            kept, seconds = (alone,), alone_seconds
        return kept if self.step_seconds(global_batch, ranks) > (1 + MARGIN) * seconds else tuple(ranks)

    def pays_from(self, rank: int, global_batch: int) -> int | None:
        """The smallest global batch, from this one up, at which a rank pays; None if none that is searched does."""
        largest = min(LARGEST_FACTOR * global_batch, sum(self.maximum) if self.maximum is not None else math.inf)
        sizes = range(global_batch, int(largest) + 1, self.granularity)
        first = bisect_left(sizes, True, key=lambda size: rank in self.paying(size))
        return sizes[first] if first < len(sizes) else None

    def throughput_limit(self, global_batch: int) -> float:
        """An upper bound on samples per second: the sum of what each rank reaches alone on whole global batches."""
        return sum(global_batch / model.seconds(global_batch) for model in self.models)


def _flat_up_to(minimum: int, model: StepTimeModel) -> StepTimeModel:
    least, later = model.seconds(minimum), bisect_right(model.breakpoints, minimum)
    return StepTimeModel((0, minimum, *model.breakpoints[later:]), (least, least, *model.times[later:]), model.slope)
