"""Measurements of one rank: its step-time curve and that curve's uncertainty, its noise, changes of its speed.

Measurements are kept by local batch. When a rank's speed changes, its earlier measurements at other local batches are
scaled, so that everything kept corresponds to one speed.
"""
# "Simulation" means simulated training on measured step-time curves, with noise, disturbed steps and changes of speed,
# as in tests/planning/test_balancer.py.

import math
from collections.abc import Mapping, Sequence
from statistics import median

from lightning_hetero.planning.step_time import StepTimeModel

# Measurements that are kept per rank: at least this many per local batch, for this many most recent local batches.
# Chosen to bound the time of a fit and the size of a profile; a multiple of half of `_SLOW_DRIFT_STEPS`.
KEPT = 42
KEPT_LOCAL_BATCHES = 8

# With this many measurements of a local batch, one disturbed step can't be the median; the smallest such number.
_RELIABLE = 3

# With this many, the median is a reference for detecting changes: the first two steps may have compiled or allocated
# memory, and must not determine the median.
_REFERENCE = 5

# A change of speed: this many steps in a row, all off by this factor (or by `_CHANGE_DEVIATIONS` times the noise, if
# that is more). Few steps where much is lost, more where it may be a short episode. Measurements at other local batches
# are evidence for sudden changes only: a GPU may well be faster with 32 samples than with 29. Tuned in simulation.
_SUDDEN_CHANGE = (4, 1.6)
_LASTING_CHANGE = (8, 1.15)
_CHANGE_DEVIATIONS = 3.0

# Measurements per other local batch that are kept after a change: below `_RELIABLE`, so that they are soon outvoted.
_KEPT_AFTER_CHANGE = 2

# A slow drift: the median of this many last steps is off by this factor from the earlier steps at the local batch (or
# by `_SLOW_DRIFT_ERRORS` standard errors, if that is more). Too little to act at once, but older measurements are
# scaled. Tuned in simulation.
_SLOW_DRIFT_STEPS = 12
_SLOW_DRIFT = 1.04
_SLOW_DRIFT_ERRORS = 3.0

# The factor from a median absolute deviation to a standard deviation, and from the standard error of a mean to that of
# a median; both for the normal distribution.
_DEVIATION_OF_MEDIAN = 1.4826
_ERROR_OF_MEDIAN = 1.2533

# With fewer deviations than this, this noise is assumed: the one that most simulations ran with. The number is chosen.
_ENOUGH_DEVIATIONS = 8
_ASSUMED_NOISE = 0.03

# Local batches within this ratio are too close together to separate a slope from noise. Then this part of the time is
# assumed to be fixed. Chosen: an error makes the next plan worse, and the measurements of that plan correct it.
_TOO_CLOSE = 4 / 3
_ASSUMED_FIXED_PART = 0.25

# Fewer than `_RELIABLE` measurements of a local batch are ignored if they are off by this part from the curve through
# reliable local batches, and one of these is within this ratio. Tuned in simulation.
_OUTLIER = 0.2
_NEARBY = 3 / 2

# Relative error of a curve for each factor e of distance from a measured local batch: between two of them, and outside
# all of them. Tuned in simulation: small, so that unmeasured local batches are tried when they promise much.
_INTERPOLATION_ERROR = 0.03
_EXTRAPOLATION_ERROR = 0.08

# Measurements of exposed communication that are kept. Chosen: the median needs no more.
_KEPT_EXPOSED = 15


class RankMeasurements:
    """Seconds of a rank's last steps at each of its most recent local batches.

    Args:
        seconds: by local batch, oldest measurements first; the local batch that was used last comes last.
        exposed: seconds of exposed communication in steps in which all other ranks waited for this one, oldest first.
    """

    def __init__(self, seconds: Mapping[int, Sequence[float]] | None = None, exposed: Sequence[float] = ()) -> None:
        self.seconds = {b: list(s) for b, s in (seconds or {}).items()}
        self.exposed = list(exposed)
        self._model: StepTimeModel | None = None
        self._noise: float | None = None

    def observe(self, local_batch: int, seconds: float) -> bool:
        """Record a step; returns whether it showed that the rank's speed has changed."""
        recent = [*self.seconds.pop(local_batch, []), seconds]
        due = len(recent) % (_SLOW_DRIFT_STEPS // 2) == 0
        # Dropped in blocks, so that the number kept still tells when the next check for a slow drift is due.
        self.seconds[local_batch] = recent[-KEPT:] if due else recent
        while len(self.seconds) > KEPT_LOCAL_BATCHES:
            del self.seconds[next(iter(self.seconds))]
        self._model = self._noise = None
        if self._follow_change(local_batch, *_SUDDEN_CHANGE, others=True):
            return True
        if self._follow_change(local_batch, *_LASTING_CHANGE, others=False):
            return True
        if due:
            self._follow_slow_drift(local_batch)
        return False

    def observe_exposed_communication(self, seconds: float) -> None:
        """Record how long the rank communicated in a step in which it was the last to be ready."""
        self.exposed = [*self.exposed, seconds][-_KEPT_EXPOSED:]

    def _follow_change(self, local_batch: int, steps: int, factor: float, *, others: bool) -> bool:
        last = self.seconds[local_batch][-steps:]
        if len(last) < steps:
            return False
        older = self._without_last(local_batch, steps)
        references = {b: median(s) for b, s in older.items() if len(s) >= _REFERENCE and (others or b == local_batch)}
        # More samples rarely make a step much shorter, so at unchanged speed the last steps lie between these bounds.
        upper = min((time for b, time in references.items() if b >= local_batch), default=math.inf)
        lower = max((time for b, time in references.items() if b <= local_batch), default=0.0)

        def outside(factor: float) -> bool:
            return min(last) > factor * upper or max(last) * factor < lower

        # In this order, since this runs in every step and the noise takes longest to compute.
        if not outside(factor) or not outside(max(factor, 1 + _CHANGE_DEVIATIONS * self.noise())):
            return False
        # How much of the change is in the fixed cost is unknown, so scaled values are uncertain: keep few.
        kept = {b: s if b == local_batch else s[-_KEPT_AFTER_CHANGE:] for b, s in older.items()}
        self._rescale(local_batch, kept, last)
        return True

    def _follow_slow_drift(self, local_batch: int) -> None:
        last = self.seconds[local_batch][-_SLOW_DRIFT_STEPS:]
        before = self.seconds[local_batch][:-_SLOW_DRIFT_STEPS]
        if len(before) < _SLOW_DRIFT_STEPS:
            return
        ratio = median(last) / median(before)
        error = self.noise() * _ERROR_OF_MEDIAN * math.sqrt(1 / len(last) + 1 / len(before))
        if abs(math.log(ratio)) > max(math.log(_SLOW_DRIFT), _SLOW_DRIFT_ERRORS * error):
            self._rescale(local_batch, self._without_last(local_batch, _SLOW_DRIFT_STEPS), last)

    def _without_last(self, local_batch: int, steps: int) -> dict[int, list[float]]:
        older = self.seconds | {local_batch: self.seconds[local_batch][:-steps]}
        return {b: s for b, s in older.items() if s}

    def _rescale(self, local_batch: int, older: dict[int, list[float]], last: list[float]) -> None:
        """Scale the older measurements at other local batches to the speed of the last steps at this one."""
        scale = median(last) / fit(older).seconds(local_batch)
        self.seconds = {b: [scale * v for v in s] for b, s in older.items() if b != local_batch}
        self.seconds[local_batch] = last
        self._model = self._noise = None

    def without_sparse(self, least: int, *, keep: int) -> "RankMeasurements":
        """A copy without the local batches measured fewer than `least` times, except for `keep`."""
        return RankMeasurements({b: s for b, s in self.seconds.items() if len(s) >= least or b == keep}, self.exposed)

    def model(self) -> StepTimeModel:
        """The curve of compute time through the measurements."""
        if self._model is None:
            self._model = fit(self.seconds)
        return self._model

    def exposed_communication(self) -> float | None:
        """Seconds that the rank communicates while all others wait for it; None if it was never the last."""
        return median(self.exposed) if self.exposed else None

    def noise(self) -> float:
        """Relative standard deviation of individual measurements around the median of their local batch."""
        if self._noise is None:
            groups = [(median(s), sorted(s)) for s in self.seconds.values() if len(s) >= _RELIABLE]
            # With an odd number, the middle one is the median itself, and carries no information about the noise.
            deviations = [abs(v / m - 1) for m, s in groups for i, v in enumerate(s) if 2 * i + 1 != len(s)]
            enough = len(deviations) >= _ENOUGH_DEVIATIONS
            self._noise = _DEVIATION_OF_MEDIAN * median(deviations) if enough else _ASSUMED_NOISE
        return self._noise

    def uncertainty(self, local_batch: int) -> float:
        """Relative standard error of the curve at a local batch.

        At a measured local batch, that of the median. Elsewhere, that of the nearest measured local batch on either
        side plus an error that grows with the distance to it; the smaller of the two.
        """
        below = sorted(b for b in self.seconds if b <= local_batch)[-1:]
        above = sorted(b for b in self.seconds if b >= local_batch)[:1]
        errors = {b: self.noise() * _ERROR_OF_MEDIAN / math.sqrt(len(self.seconds[b])) for b in below + above}
        rate = _INTERPOLATION_ERROR if len(errors) > 1 else _EXTRAPOLATION_ERROR
        return min(math.hypot(error, rate * abs(math.log(local_batch / b))) for b, error in errors.items())


def fit(measured: Mapping[int, Sequence[float]]) -> StepTimeModel:
    """Fit a model to seconds by local batch; the local batch that was used last comes last."""
    # The first step at a local batch allocates, compiles and tunes; until it is outvoted, the shortest time is used.
    measured = {b: s if len(s) >= _RELIABLE else [min(s)] for b, s in measured.items()}
    reliable = {b: s for b, s in measured.items() if len(s) >= _RELIABLE}
    if not reliable or len(reliable) == len(measured):
        return _fit_all(measured)
    model = _fit_all(reliable)

    def is_outlier(b: int, seconds: Sequence[float]) -> bool:
        nearby = any(max(b, other) <= _NEARBY * min(b, other) for other in reliable)
        return nearby and abs(median(seconds) / model.seconds(b) - 1) > _OUTLIER

    return _fit_all({b: s for b, s in measured.items() if b in reliable or not is_outlier(b, s)})


def _fit_all(measured: Mapping[int, Sequence[float]]) -> StepTimeModel:
    if max(measured) >= _TOO_CLOSE * min(measured):
        return StepTimeModel.fit([b for b, s in measured.items() for _ in s], [v for s in measured.values() for v in s])
    last, fixed = list(measured)[-1], _ASSUMED_FIXED_PART
    time = median(v * (fixed + (1 - fixed) * last / b) for b, s in measured.items() for v in s)
    return StepTimeModel((0, last), (fixed * time, time), (1 - fixed) * time / last)
