"""What was measured of one rank, and what follows from it: its curve, its noise, how sure both are, its changes.

Measurements are kept by local batch. A rank's speed may change while it has a share; what it took for other shares
before is scaled then, so that all that is kept is always of one speed.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from lightning_hetero.planning.step_time import StepTimeModel

# Measurements that are kept of a rank: at least this many of a local batch, for this many local batches (last used).
KEPT = 42
KEPT_LOCAL_BATCHES = 8

# That many measurements of a local batch make it known: one of them may be disturbed.
_KNOWN = 3

# That many make it a reference for drifts: the first two may have been compiled, or have grown the memory.
_REFERENCE = 5

# That many steps in a row, all off by this factor (or by so many times the noise, if that is more), are a drift: soon
# where much is lost, later where it may be an episode that passes. What other local batches took tells of the former
# only: a GPU may well be faster with 32 samples than with 29.
_SUDDEN = (4, 1.6)
_LASTING = (8, 1.15)
_DRIFT_SPREADS = 3.0

# Measurements of other local batches that are kept then: fewer than make one known, so that new ones soon outvote them.
_GUESSES = 2

# The median of that many steps, off by this factor from what the local batch took before (or by so many standard
# errors, if that is more), is a slow drift: too little to act at once, but the older measurements follow.
_SLOW_STEPS = 12
_SLOW_DRIFT = 1.04
_SLOW_ERRORS = 3.0

# Standard deviations in a median absolute deviation, and in the error of a median of many: normal distribution.
_NORMAL = 1.4826
_MEDIAN_ERROR = 1.2533

# The noise that is assumed while there are too few measurements to tell it.
_FEW = 8
_ASSUMED_SPREAD = 0.03

# Local batches within this ratio are too close together to tell a slope from noise. Then this part of the time is
# taken to be fixed: an error here makes the next plan less good, and its measurements make up for it.
_NARROW = 4 / 3
_FIXED = 0.25

# Measurements of a local batch that is not known yet are left out where they are off by this part from what known local
# batches nearby (within the ratio) say; further away, those say too little.
_CREDIBLE = 0.2
_NEARBY = 3 / 2

# How far off, in parts, a curve may be for each e-fold of distance from what was measured: between two measured local
# batches, and beyond all of them. Little, so that what is not known yet gets tried when it promises much.
_BETWEEN = 0.03
_BEYOND = 0.08

# A rank whose time from the last gradient to the averaged ones is the shortest is the last one: it waits for nobody.
_KEPT_TAILS = 15


class RankMeasurements:
    """Seconds of a rank's last steps at each of the last local batches that it had.

    Args:
        seconds: by local batch, oldest measurements first, the local batch that was used last at the end.
        tails: seconds that it communicated in steps in which all others waited for it, oldest first.
    """

    def __init__(self, seconds: Mapping[int, Sequence[float]] | None = None, tails: Sequence[float] = ()) -> None:
        self.seconds = {b: list(s) for b, s in (seconds or {}).items()}
        self.tails = list(tails)
        self._model: StepTimeModel | None = None
        self._spread: float | None = None

    def observe(self, local_batch: int, seconds: float) -> bool:
        """Record a step; tells whether it showed the speed of the rank to have changed."""
        recent = [*self.seconds.pop(local_batch, []), seconds]
        due = len(recent) % (_SLOW_STEPS // 2) == 0
        # Forgotten in blocks, so that their number goes on telling when the next look at slow drifts is due.
        self.seconds[local_batch] = recent[-KEPT:] if due else recent
        while len(self.seconds) > KEPT_LOCAL_BATCHES:
            del self.seconds[next(iter(self.seconds))]
        self._model = self._spread = None
        changed = self._changed_suddenly(local_batch)
        if not changed and due:
            self._follow_slowly(local_batch)
        return changed

    def observe_tail(self, seconds: float) -> None:
        """Record how long it communicated in a step in which it was the last to be ready."""
        self.tails = [*self.tails, seconds][-_KEPT_TAILS:]

    def _changed_suddenly(self, local_batch: int) -> bool:
        return self._changed(local_batch, *_SUDDEN, others=True) or self._changed(local_batch, *_LASTING, others=False)

    def _changed(self, local_batch: int, steps: int, factor: float, *, others: bool) -> bool:
        last = self.seconds[local_batch][-steps:]
        if len(last) < steps:
            return False
        older = self._without_last(local_batch, steps)
        known = {b: median(s) for b, s in older.items() if len(s) >= _REFERENCE and (others or b == local_batch)}
        # More samples seldom make a step much shorter. So, whatever the curve, these bound the last steps at unchanged
        # speed.
        most = min((time for b, time in known.items() if b >= local_batch), default=math.inf)
        least = max((time for b, time in known.items() if b <= local_batch), default=0.0)

        def outside(factor: float) -> bool:
            return min(last) > factor * most or max(last) * factor < least

        # In this order, since it is asked in every step and the noise takes longest to tell.
        if not outside(factor) or not outside(max(factor, 1 + _DRIFT_SPREADS * self.spread())):
            return False
        # How the change spreads over fixed cost and cost per sample is not known, so what is scaled is a guess: little
        # of it is kept, so that it can be doubted.
        guessed = {b: s if b == local_batch else s[-_GUESSES:] for b, s in older.items()}
        self._rescale(local_batch, guessed, last)
        return True

    def _follow_slowly(self, local_batch: int) -> None:
        last = self.seconds[local_batch][-_SLOW_STEPS:]
        before = self.seconds[local_batch][:-_SLOW_STEPS]
        if len(before) < _SLOW_STEPS:
            return
        ratio = median(last) / median(before)
        error = self.spread() * _MEDIAN_ERROR * math.sqrt(1 / len(last) + 1 / len(before))
        if abs(math.log(ratio)) > max(math.log(_SLOW_DRIFT), _SLOW_ERRORS * error):
            self._rescale(local_batch, self._without_last(local_batch, _SLOW_STEPS), last)

    def _without_last(self, local_batch: int, steps: int) -> dict[int, list[float]]:
        older = {b: s for b, s in self.seconds.items() if b != local_batch}
        if before := self.seconds[local_batch][:-steps]:
            older[local_batch] = before
        return older

    def _rescale(self, local_batch: int, older: dict[int, list[float]], last: list[float]) -> None:
        """Let the older measurements be of the speed of the last ones, which are all that is kept of their own."""
        scale = median(last) / fit(older).seconds(local_batch)
        self.seconds = {b: [scale * v for v in s] for b, s in older.items() if b != local_batch}
        self.seconds[local_batch] = last
        self._model = self._spread = None

    def trusted(self, local_batch: int, least: int) -> "RankMeasurements":
        """What is left without local batches that were measured less than `least` times, `local_batch` excepted."""
        return RankMeasurements(
            {b: s for b, s in self.seconds.items() if len(s) >= least or b == local_batch}, self.tails
        )

    def model(self) -> StepTimeModel:
        """The curve through what was measured, of own work alone."""
        if self._model is None:
            self._model = fit(self.seconds)
        return self._model

    def tail(self) -> float | None:
        """Seconds that it communicates when all others wait for it; None where it never was the last."""
        return median(self.tails) if self.tails else None

    def spread(self) -> float:
        """Relative standard deviation of single measurements around the median of their local batch."""
        if self._spread is None:
            self._spread = self._spread_now()
        return self._spread

    def _spread_now(self) -> float:
        groups = [(median(s), sorted(s)) for s in self.seconds.values() if len(s) >= _KNOWN]
        # The middle one of an odd number is its median, and tells nothing of the spread.
        off = [abs(v / m - 1) for m, s in groups for i, v in enumerate(s) if 2 * i + 1 != len(s)]
        return _NORMAL * median(off) if len(off) >= _FEW else _ASSUMED_SPREAD

    def uncertainty(self, local_batch: int) -> float:
        """Relative standard error of the curve at a local batch.

        Where it was measured, that of the median. Elsewhere, that of the neighbour which tells most: of its own median,
        and more the further it is away, since the curve between and beyond what was measured is a guess. A neighbour
        that was measured once takes nothing from what another one tells.
        """
        below = max((b for b in self.seconds if b <= local_batch), default=None)
        above = min((b for b in self.seconds if b >= local_batch), default=None)
        near = {b for b in (below, above) if b is not None}
        rate = _BETWEEN if len(near) > 1 else _BEYOND

        def told_by(b: int) -> float:
            return math.hypot(self._error(b), rate * abs(math.log(local_batch / b)))

        return min(map(told_by, near))

    def _error(self, local_batch: int) -> float:
        """Relative standard error of the median of what was measured at a local batch."""
        return self.spread() * _MEDIAN_ERROR / math.sqrt(len(self.seconds[local_batch]))


def fit(measured: Mapping[int, Sequence[float]]) -> StepTimeModel:
    """Fit a model to seconds by local batch, the one that was used last at the end."""
    # The first step at a local batch allocates, compiles and tunes; until it is outvoted, the shorter time stands.
    measured = {b: s if len(s) >= _KNOWN else [min(s)] for b, s in measured.items()}
    solid = {b: s for b, s in measured.items() if len(s) >= _KNOWN}
    if not solid or len(solid) == len(measured):
        return _through(measured)
    model = _through(solid)

    def credible(b: int, seconds: Sequence[float]) -> bool:
        nearby = any(max(b, known) <= _NEARBY * min(b, known) for known in solid)
        return not nearby or abs(median(seconds) / model.seconds(b) - 1) <= _CREDIBLE

    return _through({b: s for b, s in measured.items() if b in solid or credible(b, s)})


def _through(measured: Mapping[int, Sequence[float]]) -> StepTimeModel:
    if max(measured) >= _NARROW * min(measured):
        return StepTimeModel.fit([b for b, s in measured.items() for _ in s], [v for s in measured.values() for v in s])
    last = list(measured)[-1]
    time = median(v * (_FIXED + (1 - _FIXED) * last / b) for b, s in measured.items() for v in s)
    return StepTimeModel((0, last), (_FIXED * time, time), (1 - _FIXED) * time / last)
