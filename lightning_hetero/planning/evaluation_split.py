"""Which samples of an evaluation each rank takes, given how long its earlier evaluation batches took.

No rank waits for another during an evaluation, so steps need not match across ranks. The loader's batches, as a single
process would draw them, are assigned in order, the first ones to the first rank. So at most W - 1 of them are cut, and
no rank ever has a batch that is larger than the loader's own.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lightning_hetero.planning.allocation import allocate
from lightning_hetero.planning.measurements import RankMeasurements
from lightning_hetero.planning.step_time import StepTimeModel

# Batches stay whole if that costs no more than this part of the time: then a module computes the same for each batch as
# in a single process. Chosen: below the noise of step times.
_TOLERANCE = 0.02

BatchTimes = Mapping[Hashable, Sequence[tuple[int, float]]]
"""Local batch and seconds of each batch, by what was evaluated."""


@dataclass(frozen=True)
class Piece:
    """What a rank takes of one of the loader's batches: samples `first` to `last`, exclusive, of batch `batch`."""

    batch: int
    first: int
    last: int


def _fastest_split(units: int, seconds: Sequence[float]) -> tuple[int, ...]:
    """W numbers of units, so that the last rank finishes as early as possible; some may be 0."""
    return allocate([StepTimeModel((0, 1), (0.0, time), time) for time in seconds], units, minimum=0)


def samples_of_ranks(sizes: Sequence[int], seconds: Sequence[float], *, whole: bool = False) -> tuple[int, ...]:
    """W numbers of samples that the ranks take, consecutively from the first sample on; some may be 0.

    Args:
        sizes: samples in each of the loader's batches.
        seconds: W seconds for one batch; only their ratios matter.
        whole: never cut a batch.
    """
    if not sum(sizes):
        return (0,) * len(seconds)
    batches = _fastest_split(len(sizes), seconds)
    ends = (0, *accumulate(sizes))
    bounds = (0, *accumulate(batches))
    in_batches = tuple(ends[b] - ends[a] for a, b in pairwise(bounds))
    if whole:
        return in_batches
    in_samples = _fastest_split(ends[-1], seconds)
    cheap = _makespan(in_batches, seconds) <= (1 + _TOLERANCE) * _makespan(in_samples, seconds)
    return in_batches if cheap else in_samples


def _makespan(samples: Sequence[int], seconds: Sequence[float]) -> float:
    return max(n * time for n, time in zip(samples, seconds, strict=True))


def pieces_of(sizes: Sequence[int], samples: Sequence[int], rank: int) -> list[Piece]:
    """What one rank takes of batches of these sizes, given the W numbers of samples from `samples_of_ranks`."""
    start, stop = sum(samples[:rank]), sum(samples[: rank + 1])
    ends = (0, *accumulate(sizes))
    return [
        Piece(number, max(start - ends[number], 0), min(stop - ends[number], size))
        for number, size in enumerate(sizes)
        if max(start, ends[number]) < min(stop, ends[number + 1])
    ]


class EvaluationTimes:
    """How long all ranks' evaluation batches took, by what was evaluated; ignored if not adaptive (fixed shares)."""

    def __init__(self, world_size: int, *, adaptive: bool = True) -> None:
        self._adaptive = adaptive
        self._histories: dict[Hashable, list[RankMeasurements]] = defaultdict(
            lambda: [RankMeasurements() for _ in range(world_size)]
        )

    def update(self, ranks: Sequence[BatchTimes]) -> None:
        """Record what W ranks have measured in a finished evaluation; some may have had nothing to evaluate."""
        for rank, measured in enumerate(ranks if self._adaptive else ()):
            for key, batches in measured.items():
                for local_batch, seconds in batches:
                    self._histories[key][rank].observe(local_batch, seconds)

    def seconds(self, key: Hashable, batch: int, proportions: Sequence[float]) -> tuple[float, ...]:
        """W seconds that a batch of `batch` samples takes on each rank; only their ratios matter.

        Speeds of ranks that were not measured for this key follow from `proportions`, relative to those that were.
        """
        assumed = tuple(1 / max(share, 1e-9) for share in proportions)
        histories = self._histories.get(key)
        if histories is None:
            return assumed
        known = [history.model().seconds(batch) if history.seconds else None for history in histories]
        scales = [time / other for time, other in zip(known, assumed, strict=True) if time is not None]
        scale = sum(scales) / len(scales)
        return tuple(other * scale if time is None else time for time, other in zip(known, assumed, strict=True))
