"""When to change the plan: exploration, refinement, hysteresis, drift.

Pure decisions on measured seconds: no clock, no I/O, no randomness. Ranks that are fed the same numbers decide the
same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_hetero.allocation import allocate, proportional
from lightning_hetero.step_time import StepTimeModel

_VERSION = 1

# Measurements that are kept of a rank: this many of a local batch, for this many local batches (last used).
_KEPT = 25
_KEPT_LOCAL_BATCHES = 8

# The first split is deliberately left for one beyond the proportional one: shares go with speed to this power. Fixed
# costs always move the best split in that direction, so the two splits tend to have it between them.
_BEYOND = 1.4

# A new plan must promise to save this part of the makespan, and so much more that noise is not taken for a gain.
_HYSTERESIS = 0.03
_STANDARD_ERRORS = 2.0

# At the start and after a drift, that many plans follow each other quickly: on that many steps, and without regard to
# noise. A plan that turns out less good costs little then, and what it measures makes the next one better.
_QUICK_PLANS = 2
_QUICK_STEPS = 2

# That many steps in a row, all off by this factor (or by so many times the noise, if that is more), are a drift.
_DRIFT_STEPS = 3
_DRIFT = 1.15
_DRIFT_SPREADS = 3.0

# Standard deviations in a median absolute deviation, and in how far a median of many is off: normal distribution.
_NORMAL = 1.4826

# Local batches within this ratio are too close together to tell a slope from noise. Then this part of the time is
# taken to be fixed: an error here makes the next plan less good, and its measurements make up for it.
_NARROW = 4 / 3
_FIXED = 0.25

# Quick plans need a hint that something is wrong at all: on equal devices, two noisy steps are none.
_UNEQUAL = 0.15


@dataclass(frozen=True)
class Proposal:
    """A split that should replace the current one.

    Attributes:
        local_batches: W samples.
        predicted_seconds: W seconds of own work.
        reason: "explore" (to tell fixed cost and cost per sample apart), "balance", or "drift" (a rank's speed has
            changed).

    """

    local_batches: tuple[int, ...]
    predicted_seconds: tuple[float, ...]
    reason: str


class _Rank:
    """What was measured of one rank: seconds of its last steps at each of the last local batches it had."""

    def __init__(self, seconds: Mapping[int, Sequence[float]] | None = None) -> None:
        self.seconds = {b: list(s) for b, s in (seconds or {}).items()}  # oldest first, local batches by last use

    def observe(self, local_batch: int, seconds: float) -> bool:
        """Record a step; tells whether it showed the speed of the rank to have changed."""
        recent = [*self.seconds.pop(local_batch, []), seconds]
        self.seconds[local_batch] = recent[-_KEPT:]
        while len(self.seconds) > _KEPT_LOCAL_BATCHES:
            del self.seconds[next(iter(self.seconds))]
        return self._follow(local_batch)

    def _follow(self, local_batch: int) -> bool:
        """Scale what was measured before the speed changed, if it did."""
        last = self.seconds[local_batch][-_DRIFT_STEPS:]
        older = {b: s for b, s in self.seconds.items() if b != local_batch}
        if before := self.seconds[local_batch][:-_DRIFT_STEPS]:
            older[local_batch] = before
        known = {b: median(s) for b, s in older.items() if len(s) >= _DRIFT_STEPS}  # one step alone may be an outlier
        if len(last) < _DRIFT_STEPS or not known:
            return False
        # Samples never make a step shorter. So, whatever the curve, these bound the last steps at unchanged speed.
        most = min((time for b, time in known.items() if b >= local_batch), default=math.inf)
        least = max((time for b, time in known.items() if b <= local_batch), default=0.0)
        factor = max(_DRIFT, 1 + _DRIFT_SPREADS * self.spread())
        if not (min(last) > factor * most or max(last) * factor < least):
            return False
        scale = median(last) / _fit(older).seconds(local_batch)
        self.seconds = {b: [scale * v for v in s] for b, s in older.items() if b != local_batch}
        self.seconds[local_batch] = last
        return True

    def model(self) -> StepTimeModel:
        """The curve through what was measured."""
        return _fit(self.seconds)

    def spread(self) -> float:
        """Relative standard deviation of single measurements around the median of their local batch, 0 if unknown."""
        groups = [(median(s), sorted(s)) for s in self.seconds.values() if len(s) >= _DRIFT_STEPS]
        # The middle one of an odd number is its median, and tells nothing of the spread.
        off = [abs(v / m - 1) for m, s in groups for i, v in enumerate(s) if 2 * i + 1 != len(s)]
        return _NORMAL * median(off) if off else 0.0


class Balancer:
    """Decides when to change the plan, and to what.

    It starts from any split (an equal one, as a rule), leaves it once for one that tells fixed cost and cost per sample
    apart, and then solves for the least makespan on models of what was measured, again and again as
    measurements around the point of operation refine them, until there is nothing left to gain. From then on a plan
    changes only for a gain that noise does not explain, or because the speed of a rank has changed.

    Args:
        world_size: W.
        global_batch: samples of each observed step, over all ranks.
        minimum: least local batch, at least 1.
        granularity: local batches are multiples of it.

    Raises:
        ValueError: there is no split within these limits.

    """

    def __init__(self, world_size: int, global_batch: int, *, minimum: int = 1, granularity: int = 1) -> None:
        if minimum < 1:
            raise ValueError(f"a rank needs at least 1 sample to be measured, got minimum {minimum}")
        proportional(global_batch, [1.0] * world_size, minimum=minimum, granularity=granularity)  # is there a split?
        self.world_size = world_size
        self.global_batch = global_batch
        self.minimum = minimum
        self.granularity = granularity
        self._ranks = [_Rank() for _ in range(world_size)]
        self._started = False  # the first step of a process measures lazy initialisation, so this is not saved
        self._observed: tuple[int, ...] = ()  # the split of the last step
        self._times_observed = 0  # in a row
        self._quick_plans = _QUICK_PLANS
        self._drifted = False

    def observe(self, step: int, local_batches: Sequence[int], seconds: Sequence[float]) -> None:
        """Take in a measured step.

        Args:
            step: the global step, for the message if something is wrong.
            local_batches: W samples; the split that step ran with, whatever was proposed since.
            seconds: W seconds that each rank's own work took.

        Raises:
            ValueError: the numbers can't be measurements of a step with this global batch.

        """
        split = tuple(local_batches)
        if len(split) != self.world_size or len(seconds) != self.world_size:
            raise ValueError(
                f"step {step}: got {len(split)} local batches and {len(seconds)} times for {self.world_size} ranks"
            )
        if min(split) < 1 or sum(split) != self.global_batch:
            raise ValueError(f"step {step}: local batches {split} are not a split of {self.global_batch} samples")
        for rank, time in enumerate(seconds):
            if not (math.isfinite(time) and time > 0):
                raise ValueError(f"step {step}: rank {rank} measured {time} seconds, not a positive number")
        if not self._started:
            self._started = True
            return
        drifts = [rank.observe(b, float(t)) for rank, b, t in zip(self._ranks, split, seconds, strict=True)]
        if any(drifts):
            self._drifted, self._quick_plans = True, _QUICK_PLANS
        self._times_observed = self._times_observed + 1 if split == self._observed else 1
        self._observed = split

    def propose(self, current: tuple[int, ...], maximum: Sequence[int] | None = None) -> Proposal | None:
        """Say what the plan should be.

        Args:
            current: W samples; the newest plan that was decided, in force or not.
            maximum: W largest local batches; None for no caps.

        Returns:
            The new plan, or None to keep ``current``: because it is good, or because too little is known of it yet.

        """
        models = self.models()
        if self.world_size == 1 or models is None or self._observed != tuple(current):
            return None
        if self._times_observed < (_QUICK_STEPS if self._quick_plans > 0 else _DRIFT_STEPS):
            return None
        now = [model.seconds(b) for model, b in zip(models, current, strict=True)]
        explore = all(len(rank.seconds) == 1 for rank in self._ranks)
        if explore:
            speeds = [(b / time) ** _BEYOND for b, time in zip(current, now, strict=True)]
            split = proportional(
                self.global_batch, speeds, minimum=self.minimum, maximum=maximum, granularity=self.granularity
            )
        else:
            # Beyond twice what was measured, a curve is a guess.
            caps = [max(2 * max(rank.seconds), self.minimum) for rank in self._ranks]
            caps = [-(-cap // self.granularity) * self.granularity for cap in caps]
            if maximum is not None:
                within = [min(pair) for pair in zip(caps, maximum, strict=True)]
                caps = within if sum(within) >= self.global_batch else list(maximum)
            split = allocate(
                models, self.global_batch, minimum=self.minimum, maximum=caps, granularity=self.granularity
            )
        predicted = tuple(model.seconds(b) for model, b in zip(models, split, strict=True))
        gain = 1 - max(predicted) / max(now)
        quick = self._quick_plans > 0 and (not explore or gain > _UNEQUAL)
        if split == tuple(current) or gain <= (_HYSTERESIS if quick else self._significant()):
            return None
        reason = "drift" if self._drifted else "explore" if explore else "balance"
        self._drifted = False
        self._quick_plans = max(self._quick_plans - 1, 0)
        return Proposal(split, predicted, reason)

    def models(self) -> tuple[StepTimeModel, ...] | None:
        """The step-time models as they are now, one a rank; None before the first useful measurement."""
        return tuple(rank.model() for rank in self._ranks) if self._observed else None

    def predicted(self, local_batches: Sequence[int]) -> tuple[float, ...] | None:
        """Predict W seconds of own work for a split; None before the first useful measurement.

        Raises:
            ValueError: not one local batch a rank, or one below 1.

        """
        if (models := self.models()) is None:
            return None
        return tuple(model.seconds(b) for model, b in zip(models, local_batches, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later process needs to go on from here, as plain numbers, strings, lists and dicts."""
        return {
            "version": _VERSION,
            "world_size": self.world_size,
            "global_batch": self.global_batch,
            "measured": [[[b, list(seconds)] for b, seconds in rank.seconds.items()] for rank in self._ranks],
            "observed": list(self._observed),
            "times_observed": self._times_observed,
            "quick_plans": self._quick_plans,
            "drifted": self._drifted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. The first step of this process is dropped all the same.

        Raises:
            ValueError: the state is of another version, or of a run with other ranks or another global batch, or it
                is damaged. Nothing is changed then.

        """
        expected = {"version": _VERSION, "world_size": self.world_size, "global_batch": self.global_batch}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(f"cannot load a balancer's state of {name} {state.get(name)!r} into one of {value}")
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"a balancer's state has the entries {sorted(self.state_dict())}, got {sorted(state)}")
        ranks = [_Rank({int(b): [float(v) for v in s] for b, s in measured}) for measured in state["measured"]]
        observed = tuple(int(b) for b in state["observed"])
        if len(ranks) != self.world_size or any(bool(rank.seconds) != bool(observed) for rank in ranks):
            raise ValueError(f"a balancer's state needs measurements of all {self.world_size} ranks, or of none")
        for rank in ranks:
            for b, seconds in rank.seconds.items():
                StepTimeModel.fit([b] * len(seconds), seconds)  # raises for what cannot have been measured
        self._ranks, self._observed, self._times_observed = ranks, observed, int(state["times_observed"])
        self._quick_plans, self._drifted = int(state["quick_plans"]), bool(state["drifted"])
        self._started = False

    def _significant(self) -> float:
        """The part of the makespan that a new plan must promise to save, so that it is not noise."""
        if self._times_observed < _DRIFT_STEPS:
            return math.inf
        spread = max(rank.spread() for rank in self._ranks)
        return _HYSTERESIS + _STANDARD_ERRORS * spread / math.sqrt(min(self._times_observed, _KEPT))


def _fit(measured: dict[int, list[float]]) -> StepTimeModel:
    """Fit a model to seconds by local batch, the last used last."""
    if max(measured) >= _NARROW * min(measured):
        return StepTimeModel.fit([b for b, s in measured.items() for _ in s], [v for s in measured.values() for v in s])
    last = next(reversed(measured))
    time = median(v * (_FIXED + (1 - _FIXED) * last / b) for b, s in measured.items() for v in s)
    return StepTimeModel((0, last), (_FIXED * time, time), (1 - _FIXED) * time / last)
