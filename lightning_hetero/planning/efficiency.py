"""What step-time models say of a job: how long a step takes, which ranks pay, and how far it is from the limit.

Pure functions of numbers. A rank that takes part costs its fixed time in every step, so at a small global batch the
others may be faster without it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_hetero.planning.allocation import allocate, proportional
from lightning_hetero.planning.step_time import StepTimeModel

MARGIN = 0.02
"""A gain up to this part of a step is not worth a word: models are not better than that."""

SPARED = 0.08
"""What a CPU rank is spared in each step when it is alone, as a part of its own work for the whole global batch at
hand: nothing is copied into buckets, no hook is called, and nobody communicates on its core. That costs as much at any
local batch. In the reports of `benchmarks/speed.py`, the first rank's `own_seconds` less those of `alone` in proportion
to its samples: 0.04 to 0.09 s for ResNet-18, which takes 0.7 s alone for 64 samples, at 32 of them as at 81."""

FARTHEST = 64
"""Larger global batches are looked at up to this many times the one at hand."""


@dataclass(frozen=True)
class RankSubset:
    """Ranks that compute a global batch together, without the others.

    Attributes:
        ranks: which, in their order.
        seconds: a step of theirs at the best split; infinite if they can't hold the global batch.
    """

    ranks: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Job:
    """A job's ranks, and the limits of their local batches.

    Args:
        models: W objects with ``seconds(local_batch)``, each rank's own work, never less for more samples.
        tails: W seconds that a rank pays for communication when it is the last one to finish its own work; empty if
            unknown.
        minimum: least local batch, at least 1, for all ranks or one a rank.
        granularity: local batches are multiples of it.
        maximum: largest local batch, likewise; None for no cap.
        spared: W seconds of its own work that a rank does without when it is alone, see `SPARED`; empty for none.

    Raises:
        ValueError: these can't be ranks of a job.
    """

    models: Sequence[StepTimeModel]
    tails: Sequence[float] = ()
    minimum: int | Sequence[int] = 1
    granularity: int = 1
    maximum: int | Sequence[int] | None = None
    spared: Sequence[float] = ()
    _last: tuple[StepTimeModel, ...] = field(init=False, repr=False, compare=False)
    _least: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _most: tuple[int, ...] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size, step = len(self.models), self.granularity
        tails = tuple(self.tails) or (0.0,) * size
        least, most = _each(self.minimum, size), None if self.maximum is None else _each(self.maximum, size)
        if not size or {len(tails), len(self.spared or tails), len(least), len(most or least)} != {size}:
            raise ValueError(
                f"tails, what is spared and limits have to be one a rank for {size} models, and there has to be a model"
            )
        if not all(math.isfinite(tail) and tail >= 0 for tail in tails) or min(least) < 1 or step < 1:
            raise ValueError(f"got tails {tails}, minimum {self.minimum} and granularity {step}: too small, or no time")
        object.__setattr__(self, "_last", tuple(map(_with_tail, self.models, tails)))
        object.__setattr__(self, "_least", tuple(-(-b // step) * step for b in least))
        object.__setattr__(self, "_most", most and tuple(b // step * step for b in most))

    @property
    def world_size(self) -> int:
        """W."""
        return len(self.models)

    def earliest(self, rank: int) -> float:
        """The shortest step that a rank can take part in: its minimum, and its communication."""
        return self._last[rank].seconds(self._least[rank])

    def step_seconds(self, local_batches: Sequence[int]) -> float:
        """A step of all ranks at a split of W local batches: the last one's own work and its communication."""
        ranks = self.models if self.world_size == 1 else self._last
        return max(rank.seconds(b) for rank, b in zip(ranks, local_batches, strict=True))

    def best(self, global_batch: int, ranks: Iterable[int] | None = None) -> tuple[tuple[int, ...], float]:
        """The best split of a global batch over some ranks only, and the seconds that a step takes then.

        Args:
            global_batch: samples, a multiple of the granularity, enough for the minimum of each.
            ranks: which, in their order; None for all. One alone has nobody to communicate with.

        Returns:
            A local batch for each of `ranks`; none, and infinite seconds, if they can't hold the global batch.
        """
        chosen = tuple(range(self.world_size) if ranks is None else ranks)
        if not self._hold(global_batch, chosen):
            return (), math.inf
        if len(chosen) == 1:
            return (global_batch,), self._solo(chosen[0], global_batch)
        split = self._split(global_batch, chosen)
        return split, max(self._last[r].seconds(b) for r, b in zip(chosen, split, strict=True))

    def without(self, rank: int, global_batch: int) -> float:
        """The seconds of a step if `rank` were left out, at the best split over the others.

        Raises:
            ValueError: there is no other rank.
        """
        if self.world_size == 1:
            raise ValueError("the only rank can't be left out")
        return self.best(global_batch, [r for r in range(self.world_size) if r != rank])[1]

    def fastest(self, global_batch: int) -> RankSubset:
        """The ranks that would be fastest by themselves; of companies that are as fast, one of the largest.

        All who can do their minimum within the step of the fastest company may join it without harm. So in the order of
        these times the fastest are the first ones, and how many is found by bisection. Only a rank that is alone, and
        need not communicate, can be faster still.
        """
        earliest = [self.earliest(rank) for rank in range(self.world_size)]
        order = sorted(range(self.world_size), key=earliest.__getitem__)
        times = sorted(set(earliest))
        low, high = 0, len(times) - 1
        while low < high:  # `times[i]`: the company of all who can be done by then
            middle = (low + high) // 2
            company = [r for r in order if earliest[r] <= times[middle]]
            if self._together(global_batch, company) < times[middle + 1]:
                high = middle
            else:
                low = middle + 1
        together = tuple(r for r in range(self.world_size) if earliest[r] <= times[low])
        result = RankSubset(together, self.best(global_batch, together)[1])
        for rank in range(self.world_size):
            alone = self.best(global_batch, [rank])[1]
            if alone < result.seconds:
                result = RankSubset((rank,), alone)
        return result

    def paying(self, global_batch: int) -> RankSubset:
        """The ranks that pay at a global batch: without the others, if any, the job is faster by more than `MARGIN`.

        The others are those, from the worst on, that are not done with their minimum when a step of the fastest
        company is over, by more than `MARGIN`. Somebody always pays.
        """
        everybody = RankSubset(tuple(range(self.world_size)), self.best(global_batch)[1])
        fastest = self.fastest(global_batch)
        good = (1 + MARGIN) * fastest.seconds
        if everybody.seconds <= good:
            return everybody
        kept = tuple(r for r in everybody.ranks if r in fastest.ranks or self.earliest(r) <= good)
        company = RankSubset(kept, self.best(global_batch, kept)[1])
        if company.seconds > good:  # one alone, who would have to communicate with those others
            company = fastest
        return company if everybody.seconds > (1 + MARGIN) * company.seconds else everybody

    def pays_from(self, rank: int, global_batch: int) -> int | None:
        """The smallest global batch from which `rank` pays, found by doubling and bisection.

        Args:
            rank: which.
            global_batch: where the search begins; nothing smaller is looked at.

        Returns:
            A multiple of the granularity; None if it does not pay up to `FARTHEST` times `global_batch`, or up to what
            all ranks can hold.
        """
        if rank in self.paying(global_batch).ranks:
            return global_batch
        farthest = FARTHEST * global_batch
        if self._most is not None:
            farthest = min(farthest, sum(self._most))
        low, high = global_batch, global_batch
        while rank not in self.paying(high).ranks:
            if high >= farthest:
                return None
            low, high = high, min(2 * high, farthest)
        step = self.granularity
        while high - low > step:
            middle = (low + high) // 2 // step * step
            middle = middle if middle > low else low + step
            if rank in self.paying(middle).ranks:
                high = middle
            else:
                low = middle
        return high

    def equal(self, global_batch: int) -> tuple[int, ...]:
        """The split that plain DDP would make: W local batches."""
        return proportional(global_batch, [1.0] * self.world_size, minimum=self._least, granularity=self.granularity)

    def gain_over_equal(self, local_batches: Sequence[int]) -> float:
        """How many times as fast as an equal split of the same global batch a split of W local batches is."""
        return self.step_seconds(self.equal(sum(local_batches))) / self.step_seconds(local_batches)

    def limit(self, global_batch: int) -> float:
        """Samples a second of all ranks, each alone with the whole global batch: what no split is likely to reach."""
        return sum(global_batch / self._solo(rank, global_batch) for rank in range(self.world_size))

    def fraction_of_limit(self, global_batch: int, seconds: float) -> float:
        """The part of the limit that is reached when a step takes `seconds`; 1 with one rank alone."""
        return global_batch / seconds / self.limit(global_batch)

    def _solo(self, rank: int, global_batch: int) -> float:
        """Seconds of one rank with the whole global batch; in a job of one there is no difference to its own work."""
        own = self.models[rank].seconds(global_batch)
        if self.world_size == 1 or not self.spared:
            return own
        return own - min(self.spared[rank], own / 2)  # it can't be most of it, whatever a model says of small batches

    def _hold(self, global_batch: int, ranks: Sequence[int]) -> bool:
        return self._most is None or sum(self._most[r] for r in ranks) >= global_batch

    def _split(self, global_batch: int, ranks: Sequence[int]) -> tuple[int, ...]:
        return allocate(
            [self._last[r] for r in ranks],
            global_batch,
            minimum=[self._least[r] for r in ranks],
            maximum=None if self._most is None else [self._most[r] for r in ranks],
            granularity=self.granularity,
        )

    def _together(self, global_batch: int, ranks: Sequence[int]) -> float:
        """The makespan with tails, also of one rank."""
        if not self._hold(global_batch, ranks):
            return math.inf
        split = self._split(global_batch, ranks)
        return max(self._last[r].seconds(b) for r, b in zip(ranks, split, strict=True))


def _each(limit: int | Sequence[int], size: int) -> tuple[int, ...]:
    return (limit,) * size if isinstance(limit, int) else tuple(limit)


def _with_tail(model: StepTimeModel, tail: float) -> StepTimeModel:
    return model.scaled(1, plus=tail)
