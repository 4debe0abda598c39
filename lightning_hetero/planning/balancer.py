"""When to change the plan: exploration, refinement, hysteresis, drift.

Pure decisions on measured seconds: no clock, no I/O, no randomness. Given the same numbers, all ranks decide the same.
"""
# "Simulation" means simulated training on measured step-time curves, with noise, disturbed steps and changes of speed,
# as in tests/planning/test_balancer.py.

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lightning_hetero.planning.allocation import allocate, expected_maximum, proportional
from lightning_hetero.planning.measurements import RankMeasurements
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.reports import MeasuredStep
from lightning_hetero.planning.step_time import StepTimeModel

STATE_VERSION = 3
"""Version of `Balancer.state_dict()`; a state of another version can't be loaded."""

# A speed test does not run the user's module, and the first step of a process includes lazy initialization. Neither is
# kept as a measurement, but a rank slower by this factor in them really is slower: until there are better numbers,
# shares are in proportion to this power of the speeds. Tuned in simulation: below 1, since both exaggerate.
_CLEARLY_UNEQUAL = 2.0
_CAUTIOUS_EXPONENT = 0.75

# After a speed test no rank gets more than this many times an equal share: its memory is not known yet. Chosen.
_SPEED_TEST_LIMIT = 2

# The exploratory split lies beyond the proportional one: shares are in proportion to this power of the speeds. Fixed
# costs always move the best split in that direction, so it tends to lie between the two. Tuned in simulation.
_EXPLORATORY_EXPONENT = 1.4

# A new plan must be predicted to save this part of a step, and this many standard errors of that prediction, so that
# noise is not mistaken for a gain. The slowest of many ranks looks slower than it is, by the expected largest of W
# errors (normal distribution: sqrt(2 ln W)). Both constants were tuned in simulation.
_HYSTERESIS = 0.01
_STANDARD_ERRORS = 1.2

# At the start, and after a drift, this many exploratory plans may follow each other, regardless of noise, each for a
# gain of more than this part of a step. A plan that turns out worse costs little then, and its measurements improve the
# next one. Exploration ends after this many steps without a new plan or a drift. All tuned in simulation.
_EXPLORATORY_PLANS = 4
_EXPLORATORY_GAIN = 0.03
_STEPS_TO_SETTLE = 10

# The first of these plans needs a larger gain: on equal devices, two noisy steps are no reason to explore. Tuned in
# simulation of equal devices.
_IMBALANCE = 0.15

# Afterwards a plan is reconsidered at every n-th step under it, and less often once it has held for this many steps:
# that takes milliseconds, and a sudden change of speed is acted on at once anyway. Chosen.
_RECONSIDER_EVERY = 5
_STEADY_STEPS = 60
_RECONSIDER_STEADY_EVERY = 20

# Local batches that were measured only a few times are tried again for a gain above this part of a step. Tuned in
# simulation of disturbed steps.
_RETRY_GAIN = 0.1

# A rank is known to be the last if every other has waited longer by this part of that one's compute time. Chosen.
_LAST_RANK_MARGIN = 0.1

# Ranks that take this many times as long per sample as the fastest also communicate slowly: a CPU does both itself.
# Chosen between equal ranks and the throttled CPU ranks of `benchmarks/speed.py`.
_SLOW_COMMUNICATOR = 1.5

# Measurements per local batch that are loaded from a profile: enough for a median, soon outvoted. Chosen.
_KEPT_FROM_PROFILE = 5

# Splits are searched with every rank's time increased by this many standard deviations: the more a rank's time varies,
# the larger the margin it needs, since the last rank decides. Chosen as a grid; the expected step time selects from it.
_NOISE_MARGINS = (0.0, 0.5, 1.0, 1.5)


class Balancer:
    """Decides when to change the plan, and to what.

    It starts from any split (usually an equal one), changes it once to an exploratory one that separates fixed cost
    from cost per sample, and then minimizes the expected step time on models of the measurements, again and again as
    measurements near the current split refine them, until there is nothing left to gain. From then on a plan changes
    only for a gain that noise does not explain, or because the speed of a rank has changed.

    A step is over when the last rank has computed and its exposed communication is over: the time of a rank is its
    compute time plus its exposed communication.

    The state holds the measurements of an earlier run of the same job; `first_plan` follows from them.

    Raises:
        ValueError: there is no split within these limits, or the state is of another job or version. A damaged state
            raises a ValueError, KeyError or TypeError, here or in `first_plan`.
    """

    def __init__(
        self,
        world_size: int,
        global_batch: int,
        *,
        minimum: int = 1,
        granularity: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if minimum < 1:
            raise ValueError(f"a rank needs at least 1 sample to be measured, got minimum {minimum}")
        self._world_size, self._global_batch = world_size, global_batch
        self._minimum, self._granularity = minimum, granularity
        self._limits = {"minimum": minimum, "granularity": granularity}
        self._proportional([1.0] * world_size, None)  # raises where there is no split
        self._ranks = [RankMeasurements() for _ in range(world_size)]
        self._first_step: MeasuredStep | None = None  # of this process; not kept as a measurement
        self._first_step_used = False
        self._last_split: tuple[int, ...] = ()  # that the last measured step ran with
        self._steps_at_split = 0  # measured in a row with that split
        self._steps_since_change = 0  # of the split, or of a rank's speed
        self._exploratory_plans = _EXPLORATORY_PLANS  # still allowed
        self._drifted = False
        if state is not None:
            self._load(state)

    def observe(self, measured: MeasuredStep) -> None:
        """Record a measured step; it counts for the split that it ran with, even if another plan was proposed since.

        Raises:
            ValueError: the numbers can't be measurements of a step with this global batch.
        """
        step, split, seconds = measured.step, measured.local_batches, measured.compute_seconds
        ranks = self._world_size
        if not len(split) == len(seconds) == ranks:
            raise ValueError(f"step {step}: got {len(split)} local batches and {len(seconds)} times for {ranks} ranks")
        if min(split) < 1 or sum(split) != self._global_batch:
            raise ValueError(f"step {step}: local batches {split} are not a split of {self._global_batch} samples")
        for rank, time in enumerate(seconds):
            if not (math.isfinite(time) and time > 0):
                raise ValueError(f"step {step}: rank {rank} measured {time} seconds, not a positive number")
        if self._first_step is None:
            self._first_step = measured
            return
        charged = self._attribute_communication(measured)
        changes = [rank.observe(b, t) for rank, b, t in zip(self._ranks, split, charged, strict=True)]
        same = split == self._last_split
        self._steps_at_split = self._steps_at_split + 1 if same else 1
        self._steps_since_change = self._steps_since_change + 1 if same else 1
        self._last_split = split
        if any(changes):
            self._drifted, self._exploratory_plans, self._steps_since_change = True, _EXPLORATORY_PLANS, 0
        if self._steps_since_change >= _STEPS_TO_SETTLE:
            self._exploratory_plans = 0

    def _attribute_communication(self, measured: MeasuredStep) -> list[float]:
        """W compute times, in seconds, plus the communication that a slow rank will overlap with its backward pass.

        The rank for which all others wait averages most of its gradients during its backward pass, and only the rest is
        exposed, which is recorded here. If ranks are ready together, or average after the backward pass, all of the
        communication comes at the end. Once a slow communicator is the last rank, that communication will take time
        within its backward pass, and until then it overlaps with the computing of others: so it is added to that rank.
        """
        charged, sync = list(measured.compute_seconds), measured.sync_seconds
        if not sync or min(sync) <= 0:
            return charged
        least = min(sync)
        last = [rank for rank, wait in enumerate(sync) if wait - least <= _LAST_RANK_MARGIN * charged[rank]]
        if len(last) == 1 and not measured.averaged_after_backward:
            self._ranks[last[0]].observe_exposed_communication(least)
            return charged
        per_sample = [seconds / b for seconds, b in zip(charged, measured.local_batches, strict=True)]
        for rank in last:
            slow = per_sample[rank] > _SLOW_COMMUNICATOR * min(per_sample)
            if slow and _SLOW_COMMUNICATOR * per_sample[rank] > max(per_sample):
                charged[rank] += max(0.0, least - (self._ranks[rank].exposed_communication() or 0.0))
        return charged

    def propose(
        self, current: tuple[int, ...], maximum: Sequence[int] | None = None, *, first_step: int = 0
    ) -> Plan | None:
        """A plan, from `first_step` on, that should replace `current`, the newest plan's split, in force or not.

        None keeps `current`: because it is good, or because there are too few measurements of it yet. No rank gets more
        than its maximum.
        """
        if not self._last_split:
            return self._propose_from_first_step(current, maximum, first_step)
        too_much = maximum is not None and any(b > most for b, most in zip(current, maximum, strict=True))
        in_force = self._last_split == current
        if not in_force:
            self._steps_since_change = 0  # a plan starts only after the batches that loaders have already drawn
        steady = self._steps_at_split >= _STEADY_STEPS
        due = self._steps_at_split % (_RECONSIDER_STEADY_EVERY if steady else _RECONSIDER_EVERY) == 0
        if not too_much and not (in_force and (self._exploratory_plans > 0 or due)):
            return None
        if due and self._steps_at_split >= _STEPS_TO_SETTLE and in_force:
            self._discard_sparse_measurements(current, maximum)
        explore = all(len(rank.seconds) == 1 for rank in self._ranks)
        if explore:  # go beyond the proportional split
            rates = [b / model.seconds(b) for model, b in zip(self._models(), current, strict=True)]
            split = self._proportional([rate**_EXPLORATORY_EXPONENT for rate in rates], maximum)
        else:
            split = self._best_split(maximum)
        gain = 1 - self._expected_seconds(split) / self._expected_seconds(current)
        quick = self._exploratory_plans > 0 and (gain > _IMBALANCE or not explore)
        needed = _EXPLORATORY_GAIN if quick else self._significant_gain(current, split) if due else math.inf
        if split == current or (gain <= needed and not too_much):
            return None
        reason = "memory" if too_much else "drift" if self._drifted else "explore" if explore else "balance"
        self._drifted = False
        self._exploratory_plans = max(self._exploratory_plans - 1, 0)
        return Plan(first_step, split, self._predicted_seconds(split), reason)

    @property
    def is_exploring(self) -> bool:
        """Whether it is still searching for the right plan, so that it can use each step's measurements at once."""
        return self._exploratory_plans > 0

    def split_from_speeds(self, speeds: Sequence[float], current: tuple[int, ...]) -> tuple[int, ...]:
        """A split to start with, from a speed test of the devices; `current` if they are not clearly unequal."""
        for rank, speed in enumerate(speeds):
            if not (math.isfinite(speed) and speed > 0):
                raise ValueError(f"the speed test of rank {rank} found {speed}, not a positive number")
        return self._cautious_split(speeds, [_SPEED_TEST_LIMIT * self._rounded_up(b) for b in current]) or current

    def first_plan(self) -> Plan:
        """The plan of step 0 that follows from the state of an earlier run."""
        # No rank gets more than it has had before: whether more fits in its memory is not known.
        step = self._granularity
        had = [max(max(rank.seconds) // step * step, self._minimum) for rank in self._ranks]
        split = self._best_split(had if sum(had) >= self._global_batch else None)
        return Plan(0, split, self._predicted_seconds(split), "profile")

    def models(self) -> tuple[StepTimeModel, ...] | None:
        """W current models of compute time; None before the first useful measurement."""
        return self._models() if self._last_split else None

    def exposed_communication(self) -> tuple[float, ...]:
        """W seconds that each rank communicates while all others wait for it; all 0 before any was measured."""
        known = [rank.exposed_communication() for rank in self._ranks]
        # A rank that was never the last is assumed to be like the others.
        usual = median([seconds for seconds in known if seconds is not None] or [0.0])
        return tuple(usual if seconds is None else seconds for seconds in known)

    def state_dict(self) -> dict[str, Any]:
        """What a later run of the same job can start from, as plain numbers, lists and dicts."""
        return {
            "version": STATE_VERSION,
            "world_size": self._world_size,
            "global_batch": self._global_batch,
            "measured": [[[b, list(seconds)] for b, seconds in rank.seconds.items()] for rank in self._ranks],
            "exposed_communication": [list(rank.exposed) for rank in self._ranks],
            "last_split": list(self._last_split),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        expected = {"version": STATE_VERSION, "world_size": self._world_size, "global_batch": self._global_batch}
        for name, value in expected.items():
            if state[name] != value:
                raise ValueError(f"cannot load a balancer's state with {name} {state[name]!r} into one with {value}")
        if not state["last_split"]:
            raise ValueError("cannot load the state of a run that has measured nothing")
        self._ranks = [
            RankMeasurements({b: seconds[-_KEPT_FROM_PROFILE:] for b, seconds in measured}, exposed)
            for measured, exposed in zip(state["measured"], state["exposed_communication"], strict=True)
        ]
        self._last_split = tuple(state["last_split"])

    def _propose_from_first_step(
        self, current: tuple[int, ...], maximum: Sequence[int] | None, first_step: int
    ) -> Plan | None:
        first = self._first_step
        if first is None or self._first_step_used:
            return None
        self._first_step_used = True
        rates = [b / seconds for b, seconds in zip(first.local_batches, first.compute_seconds, strict=True)]
        split = self._cautious_split(rates, maximum)
        if split is None or split == current:
            return None
        return Plan(first_step, split, tuple(b / rate for b, rate in zip(split, rates, strict=True)), "explore")

    def _discard_sparse_measurements(self, current: tuple[int, ...], maximum: Sequence[int] | None) -> None:
        """Drop local batches that were measured only a few times, if the other measurements predict a large gain.

        A split that was tried while a rank was delayed by something else, or compiled, was abandoned, and would look
        bad forever. Once its measurements are dropped it is tried again, and for long enough this time.
        """
        before = self._ranks
        after = [rank.without_sparse(_RECONSIDER_EVERY, keep=b) for rank, b in zip(before, current, strict=True)]
        if all(len(new.seconds) == len(old.seconds) for new, old in zip(after, before, strict=True)):
            return  # nothing to drop, as in nearly every step of a long run
        self._ranks = after
        if 1 - self._expected_seconds(self._best_split(maximum)) / self._expected_seconds(current) <= _RETRY_GAIN:
            self._ranks = before

    def _cautious_split(self, rates: Sequence[float], maximum: Sequence[int] | None) -> tuple[int, ...] | None:
        """A split part of the way towards uncertain rates; None if they are not clearly unequal."""
        if max(rates) < _CLEARLY_UNEQUAL * min(rates):
            return None
        return self._proportional([rate**_CAUTIOUS_EXPONENT for rate in rates], maximum)

    def _proportional(self, shares: Sequence[float], maximum: Sequence[int] | None) -> tuple[int, ...]:
        return proportional(self._global_batch, shares, maximum=maximum, **self._limits)

    def _best_split(self, maximum: Sequence[int] | None) -> tuple[int, ...]:
        """The split with the lowest expected step time, among those found with several margins for noise."""
        # Beyond twice the largest measured local batch, a curve is too uncertain. Chosen.
        caps = [self._rounded_up(max(2 * max(rank.seconds), self._minimum)) for rank in self._ranks]
        if maximum is not None:
            within = list(map(min, caps, maximum))
            caps = within if sum(within) >= self._global_batch else list(maximum)
        ranks = list(zip(self._models(), self._ranks, self.exposed_communication(), strict=True))
        splits = []
        for margin in _NOISE_MARGINS:
            models = [model.scaled(1 + margin * rank.noise(), plus=exposed) for model, rank, exposed in ranks]
            splits.append(allocate(models, self._global_batch, maximum=caps, **self._limits))
        return min(dict.fromkeys(splits), key=self._expected_seconds)

    def _rounded_up(self, local_batch: int) -> int:
        return -(-local_batch // self._granularity) * self._granularity

    def _predicted_seconds(self, split: Sequence[int]) -> tuple[float, ...]:
        return tuple(model.seconds(b) for model, b in zip(self._models(), split, strict=True))

    def _rank_seconds(self, split: Sequence[int]) -> list[float]:
        """W seconds: compute time plus exposed communication."""
        return list(map(float.__add__, self._predicted_seconds(split), self.exposed_communication()))

    def _expected_seconds(self, split: Sequence[int]) -> float:
        """Expected seconds of a step, given each rank's measured noise."""
        times = self._rank_seconds(split)
        return expected_maximum(times, [t * rank.noise() for t, rank in zip(times, self._ranks, strict=True)])

    def _significant_gain(self, current: Sequence[int], split: Sequence[int]) -> float:
        """The part of a step that a new plan must be predicted to save for the gain not to be noise."""
        errors = []
        for local_batches in (current, split):
            times = self._rank_seconds(local_batches)
            last = times.index(max(times))
            errors.append(self._ranks[last].uncertainty(local_batches[last]))
        standard_errors = max(_STANDARD_ERRORS, math.sqrt(2 * math.log(self._world_size)))
        return max(_HYSTERESIS, standard_errors * math.hypot(*errors))

    def _models(self) -> tuple[StepTimeModel, ...]:
        return tuple(rank.model() for rank in self._ranks)
