"""Looks for the fastest fixed split, by measuring as little as will do."""

from collections.abc import Callable, Sequence
from statistics import median

from figures import Split

LEAST = 2
"""Samples of a rank: BatchNorm needs as many."""

_POWERS = (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
"""Shares go with the solo rates to these powers; fixed costs put the best split beyond the proportional one."""
_START = 1.5

_LOOK = 2  # steps of a split that show whether more of them are worth their time
_HOPELESS = 1.3  # a split whose step takes this many times the best one's is not looked at again
_BETTER = 0.995  # below this part of the best time, a neighbor is better


def grid(
    rates: Sequence[float], global_batch: int, minimum: int = LEAST, powers: Sequence[float] = _POWERS
) -> list[Split]:
    """Splits from equal to far beyond the one in proportion to `rates` (samples/s of each rank alone)."""
    from lightning_hetero.planning.allocation import proportional

    splits = [proportional(global_batch, [rate**power for rate in rates], minimum=minimum) for power in powers]
    return list(dict.fromkeys(splits))


def neighbors(split: Split, samples: int, minimum: int = LEAST) -> list[Split]:
    """The splits that come from moving `samples` from one rank to another."""
    found = []
    for giver in range(len(split)):
        for taker in range(len(split)):
            if giver != taker and split[giver] - samples >= minimum:
                moved = list(split)
                moved[giver] -= samples
                moved[taker] += samples
                found.append(tuple(moved))
    return found


class Search:
    """Everything that was measured of fixed splits while looking for the best.

    Args:
        measure: from a split, the number of steps and whether it goes on from where it stopped, to those steps' times.
        steps: that are measured of a split that may be the best.
        minimum: least local batch.
    """

    def __init__(
        self, measure: Callable[[Split, int, bool], Sequence[float]], steps: int, minimum: int = LEAST
    ) -> None:
        self._measure = measure
        self._steps = steps
        self._minimum = minimum
        self.seconds: dict[Split, float] = {}
        """Median step time of each split that was measured."""

    @property
    def best(self) -> Split:
        """The fastest so far."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def finalists(self, number: int) -> list[Split]:
        """The fastest ones, the best first."""
        return sorted(self.seconds, key=self.seconds.__getitem__)[:number]

    def hopeless(self, split: Split) -> bool:
        """Whether a measured split is so much slower than the best that those beyond it need not be measured."""
        return self.seconds[split] > _HOPELESS * self.seconds[self.best]

    def look_at(self, split: Split) -> float:
        """Measure a split, once; one that is clearly worse than the best by a few steps only."""
        if split not in self.seconds:
            few = min(_LOOK, self._steps)
            times = list(self._measure(split, few, False))
            self.seconds[split] = median(times)
            if self._steps > few and not self.hopeless(split):
                times += self._measure(split, self._steps - few, True)
                self.seconds[split] = median(times)
        return self.seconds[split]

    def walk(self, splits: Sequence[Split], start: int) -> None:
        """Measure splits that lie in a row, from the one at `start` to both sides, up to where it is hopeless.

        Beyond a hopeless split there is no better one as long as step times do not fall again: a rank that is late with
        a local batch is later with a larger one.
        """
        self.look_at(splits[start])
        for side in (splits[start + 1 :], splits[:start][::-1]):
            for split in side:
                self.look_at(split)
                if self.hopeless(split):
                    break

    def refine(self, samples: int, finest: int = 1) -> None:
        """Move samples between ranks, ever fewer of them, until no neighbor of the best split is better.

        Args:
            samples: to begin with.
            finest: the fewest that are moved.
        """
        while True:
            best = self.best
            for split in neighbors(best, samples, self._minimum):
                if split not in self.seconds and self.look_at(split) < _BETTER * self.seconds[best]:
                    break
            if self.best == best:
                if samples <= finest:
                    return
                samples = max(finest, samples // 2)

    def run(self, rates: Sequence[float], global_batch: int, finest: int | None = None) -> None:
        """The whole search: a grid, then the neighbors.

        Args:
            rates: of each rank alone, in any unit.
            global_batch: samples over all ranks.
            finest: see `polish`.
        """
        splits = grid(rates, global_batch, self._minimum)
        (start,) = grid(rates, global_batch, self._minimum, [_START])
        self.walk(splits, splits.index(start))
        self.polish(global_batch, finest)

    def polish(self, global_batch: int, finest: int | None = None) -> None:
        """Refine, first by a 32nd of the global batch.

        Args:
            global_batch: samples over all ranks.
            finest: the fewest samples that are moved; None: a 128th of the global batch, or one where that is more.
        """
        finest = finest or max(1, global_batch // 128)
        self.refine(max(finest, global_batch // 32), finest)
