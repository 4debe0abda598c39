"""When to change the plan: exploration, refinement, hysteresis, drift.

Pure decisions on measured seconds: no clock, no I/O, no randomness. Ranks that are fed the same numbers decide the
same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_hetero.planning.allocation import allocate, expected_maximum, proportional
from lightning_hetero.planning.measurements import RankMeasurements
from lightning_hetero.planning.step_time import StepTimeModel

STATE_VERSION = 2
"""Of `Balancer.state_dict()`: a state of another version can't be loaded."""

# A probe is not the user's work, and the first step of a process measures lazy initialisation. They are no
# measurements, but a rank that needs that many times as long as another is slower all the same: shares go with this
# power of the speeds they suggest until there are better numbers. Each step of an equal split costs what several of the
# best one do.
_HINT = 2.0
_HINT_POWER = 0.75

# Nothing is known of a step before the first one: a guess gives no rank more than so many times its equal share.
_GUESS_REACH = 2

# The first split is deliberately left for one beyond the proportional one: shares go with speed to this power. Fixed
# costs always move the best split in that direction, so the two splits tend to have it between them.
_BEYOND = 1.4

# A new plan must promise to save this part of a step, and so many standard errors of that promise, so that noise is not
# taken for a gain. The last of many ranks looks slower than it is, by how much the largest of W errors stands out.
_HYSTERESIS = 0.01
_STANDARD_ERRORS = 1.2


def _errors_to_exceed(world_size: int) -> float:
    return max(_STANDARD_ERRORS, math.sqrt(2 * math.log(world_size)))


# At the start, and after a drift, that many plans follow each other quickly: without regard to noise, for gains from
# this part on. A plan that turns out less good costs little then, and what it measures makes the next one better.
_QUICK_PLANS = 4
_QUICK_GAIN = 0.03
_SETTLED = 10  # steps without a new plan and without a drift, after which nothing is quick any more

# Afterwards, and where there is no hint that anything is wrong, a plan is judged on that many steps at least.
_STEPS = 5

# A plan that has been in force for that many steps is looked at again at every so manieth one only: a look takes some
# milliseconds, and a sudden change of speed does not wait for it.
_RESTING = 60
_RESTING_STEPS = 20

# Quick plans need a hint that something is wrong at all: on equal devices, two noisy steps are none.
_UNEQUAL = 0.15

# A gain that is worth another try of what was measured a few times only.
_DOUBT = 0.1

# The last rank is known for certain where the others have waited longer by this part of its own work.
_CLEARLY = 0.1

# Ranks that take this many times as long for a sample as the fastest communicate slowly too: a CPU does that itself.
_SLOW = 1.5

# Measurements of a local batch that are taken over from an earlier run.
_REMEMBERED = 5

# Splits are looked for with every rank's time longer by so many standard deviations: the more a rank's time varies, the
# more room it needs, since the last rank decides.
_ROOM = (0.0, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Proposal:
    """A split that should replace the current one.

    Attributes:
        local_batches: W samples.
        predicted_seconds: W seconds of own work.
        reason: "explore" (to tell fixed cost and cost per sample apart), "balance", "drift" (a rank's speed has
            changed), "memory" (the current split asks a rank for more than it may take), or "profile" (an earlier run
            knew).

    """

    local_batches: tuple[int, ...]
    predicted_seconds: tuple[float, ...]
    reason: str


class Balancer:
    """Decides when to change the plan, and to what.

    It starts from any split (an equal one, as a rule), leaves it once for one that tells fixed cost and cost per sample
    apart, and then solves for the least expected step time on models of what was measured, again and again as
    measurements around the point of operation refine them, until there is nothing left to gain. From then on a plan
    changes only for a gain that noise does not explain, or because the speed of a rank has changed.

    A step is over when the last rank has done its own work and has communicated: the time of a rank is its own work
    plus its tail, what it communicates when all others wait for it.

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
        self._ranks = [RankMeasurements() for _ in range(world_size)]
        self._first: tuple[float, ...] | None = None  # seconds of the first step of a process, so this is not saved
        self._hinted = False
        self._observed: tuple[int, ...] = ()  # the split of the last step
        self._times_observed = 0  # in a row
        self._calm = 0  # steps since the plan or the speed of a rank has changed
        self._quick_plans = _QUICK_PLANS
        self._drifted = False

    def observe(
        self,
        step: int,
        local_batches: Sequence[int],
        seconds: Sequence[float],
        averaging: Sequence[float] = (),
        *,
        apart: bool = False,
    ) -> None:
        """Take in a measured step.

        Args:
            step: the global step, for the message if something is wrong.
            local_batches: W samples; the split that step ran with, whatever was proposed since.
            seconds: W seconds that each rank's own work took.
            averaging: W seconds between each rank's last gradient and the averaged ones; 0 or none for unknown.
            apart: gradients were averaged after the backward pass, and not during it.

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
        if self._first is None:
            self._first = tuple(seconds)
            return
        own = list(map(float, seconds))
        if averaging and min(averaging) > 0 and self.world_size > 1:
            self._hear_of_averaging(split, own, averaging, apart=apart)
        drifts = [rank.observe(b, t) for rank, b, t in zip(self._ranks, split, own, strict=True)]
        self._times_observed = self._times_observed + 1 if split == self._observed else 1
        self._calm = self._calm + 1 if split == self._observed else 1
        self._observed = split
        if any(drifts):
            self._drifted, self._quick_plans, self._calm = True, _QUICK_PLANS, 0
        if self._calm >= _SETTLED:
            self._quick_plans = 0

    def _hear_of_averaging(
        self, split: Sequence[int], own: list[float], averaging: Sequence[float], *, apart: bool
    ) -> None:
        """Learn a tail, or put to a rank's own work what it would have communicated during its backward pass.

        The rank for which all others wait averages most of its gradients during its backward pass, and a tail remains.
        Where ranks are ready together, or average afterwards, nobody has begun: all of it comes at the end. That is
        work of the slow communicator, which it will do in its backward pass as soon as it is the last, and beside the
        others' work as long as it isn't.

        Args:
            split: W local batches.
            own: W seconds, changed in place.
            averaging: W seconds.
            apart: see `observe`.
        """
        least = min(averaging)
        last = [rank for rank, wait in enumerate(averaging) if wait - least <= _CLEARLY * own[rank]]
        if len(last) == 1 and not apart:
            self._ranks[last[0]].observe_tail(float(least))
            return
        paces = [seconds / b for seconds, b in zip(own, split, strict=True)]
        for rank in last:
            if paces[rank] > _SLOW * min(paces) and _SLOW * paces[rank] > max(paces):
                own[rank] += max(0.0, least - (self._ranks[rank].tail() or 0.0))

    def propose(self, current: tuple[int, ...], maximum: Sequence[int] | None = None) -> Proposal | None:
        """Say what the plan should be.

        Args:
            current: W samples; the newest plan that was decided, in force or not.
            maximum: W samples that each rank can take at the most; None for no limit.

        Returns:
            The new plan, or None to keep ``current``: because it is good, or because too little is known of it yet.

        """
        if self.world_size == 1:
            return None
        too_much = maximum is not None and any(b > most for b, most in zip(current, maximum, strict=True))
        if not self._observed:
            return None if self._first is None or self._hinted else self._hint(current, maximum)
        if self._observed != tuple(current):
            self._calm = 0  # a plan waits behind what loaders have drawn already
        # To look at every step would cost more than it could bring.
        rests = self._times_observed >= _RESTING
        pause = self._times_observed % (_RESTING_STEPS if rests else _STEPS) == 0
        if not too_much and not (self._observed == tuple(current) and (self._quick_plans > 0 or pause)):
            return None
        if pause and self._times_observed >= _SETTLED and self._observed == tuple(current):
            self._doubt(current, maximum)
        explore = all(len(rank.seconds) == 1 for rank in self._ranks)
        split = self._beyond(current, maximum) if explore else self._best(maximum)
        gain = 1 - self._expected(split) / self._expected(current)
        quick = self._quick_plans > 0 and (gain > _UNEQUAL or not explore)
        needed = _QUICK_GAIN if quick else self._significant(current, split) if pause else math.inf
        if split == tuple(current) or (gain <= needed and not too_much):
            return None
        reason = "memory" if too_much else "drift" if self._drifted else "explore" if explore else "balance"
        self._drifted = False
        self._quick_plans = max(self._quick_plans - 1, 0)
        return Proposal(split, tuple(m.seconds(b) for m, b in zip(self._models(), split, strict=True)), reason)

    def _doubt(self, current: tuple[int, ...], maximum: Sequence[int] | None) -> None:
        """Forget local batches of which little is known where the others promise much without them.

        A split that was tried while something else held a rank up, or while it compiled, was left again, and looks bad
        for ever. Once it is forgotten it gets tried again, and long enough this time.
        """
        kept = self._ranks
        trusted = [rank.trusted(b, _STEPS) for rank, b in zip(kept, current, strict=True)]
        if all(len(new.seconds) == len(old.seconds) for new, old in zip(trusted, kept, strict=True)):
            return  # nothing to forget, as in nearly every look of a long run
        self._ranks = trusted
        if 1 - self._expected(self._best(maximum)) / self._expected(current) <= _DOUBT:
            self._ranks = kept

    @property
    def is_exploring(self) -> bool:
        """Whether it is still looking for the right plan, so that each step earlier that it hears of one is a gain."""
        return self.world_size > 1 and self._quick_plans > 0

    def guess(self, speeds: Sequence[float], current: tuple[int, ...]) -> tuple[int, ...]:
        """A split to begin with, from a probe of the devices.

        Args:
            speeds: W positive numbers; only their ratios matter.
            current: W samples, of the equal split, which stays where the devices are not clearly unequal.

        Raises:
            ValueError: a speed can't have been measured.

        """
        for rank, speed in enumerate(speeds):
            if not (math.isfinite(speed) and speed > 0):
                raise ValueError(f"the probe of rank {rank} found a speed of {speed}, not a positive number")
        most = [_GUESS_REACH * -(-b // self.granularity) * self.granularity for b in current]
        return self._toward(speeds, current, most) or current

    def start_from(self, state: Mapping[str, Any]) -> Proposal:
        """Begin with what an earlier run of the same job has measured, and say what the first plan should be.

        Of each local batch the last few measurements are kept: enough for the curve, and soon outweighed by new ones.
        No rank gets more than it has had: nothing is known of its memory beyond that.

        Raises:
            ValueError: see `load_state_dict`, or the earlier run has measured nothing.

        """
        self.load_state_dict(state)
        if not self._observed:
            raise ValueError("an earlier run that has measured nothing is nothing to start from")
        for rank in self._ranks:
            rank.seconds = {b: seconds[-_REMEMBERED:] for b, seconds in rank.seconds.items()}
        self._times_observed, self._calm, self._quick_plans = 0, 0, _QUICK_PLANS
        self._drifted, self._hinted = False, True
        step = self.granularity
        had = [max(max(rank.seconds) // step * step, self.minimum) for rank in self._ranks]
        split = self._best(had if sum(had) >= self.global_batch else None)
        return Proposal(split, tuple(m.seconds(b) for m, b in zip(self._models(), split, strict=True)), "profile")

    def _hint(self, current: tuple[int, ...], maximum: Sequence[int] | None) -> Proposal | None:
        """A first guess from the first step alone."""
        assert self._first is not None
        self._hinted = True
        rates = [b / seconds for b, seconds in zip(current, self._first, strict=True)]
        split = self._toward(rates, current, maximum)
        if split is None:
            return None
        return Proposal(split, tuple(b / rate for b, rate in zip(split, rates, strict=True)), "explore")

    def _toward(
        self, rates: Sequence[float], current: tuple[int, ...], maximum: Sequence[int] | None
    ) -> tuple[int, ...] | None:
        """A split some way towards rates that are only guessed; None where they say nothing."""
        if max(rates) < _HINT * min(rates):
            return None
        split = self._shared([rate**_HINT_POWER for rate in rates], maximum)
        return split if split != tuple(current) else None

    def _beyond(self, current: tuple[int, ...], maximum: Sequence[int] | None) -> tuple[int, ...]:
        models = self._models()
        rates = [b / model.seconds(b) for model, b in zip(models, current, strict=True)]
        return self._shared([rate**_BEYOND for rate in rates], maximum)

    def _shared(self, shares: Sequence[float], maximum: Sequence[int] | None) -> tuple[int, ...]:
        return proportional(
            self.global_batch, shares, minimum=self.minimum, maximum=maximum, granularity=self.granularity
        )

    def _best(self, maximum: Sequence[int] | None) -> tuple[int, ...]:
        """The split with the least expected step time, of those that leave room for noise in several amounts."""
        # Beyond twice what was measured, a curve is a guess.
        caps = [max(2 * max(rank.seconds), self.minimum) for rank in self._ranks]
        caps = [-(-cap // self.granularity) * self.granularity for cap in caps]
        if maximum is not None:
            within = [min(pair) for pair in zip(caps, maximum, strict=True)]
            caps = within if sum(within) >= self.global_batch else list(maximum)
        found = []
        for room in _ROOM:
            models = [
                model.scaled(1 + room * rank.spread(), plus=tail)
                for model, rank, tail in zip(self._models(), self._ranks, self.tails(), strict=True)
            ]
            found.append(
                allocate(models, self.global_batch, minimum=self.minimum, maximum=caps, granularity=self.granularity)
            )
        return min(dict.fromkeys(found), key=self._expected)

    def _times(self, split: Sequence[int]) -> list[float]:
        """W seconds of own work and tail."""
        return [m.seconds(b) + tail for m, b, tail in zip(self._models(), split, self.tails(), strict=True)]

    def _expected(self, split: Sequence[int]) -> float:
        """Mean seconds of a step, with the noise that each rank has shown."""
        times = self._times(split)
        spreads = [rank.spread() for rank in self._ranks]
        return expected_maximum(times, [time * spread for time, spread in zip(times, spreads, strict=True)])

    def _significant(self, current: Sequence[int], split: Sequence[int]) -> float:
        """The part of a step that a new plan must promise to save, so that it is not noise."""
        errors = []
        for local_batches in (current, split):
            times = self._times(local_batches)
            last = max(range(self.world_size), key=times.__getitem__)
            errors.append(self._ranks[last].uncertainty(local_batches[last]))
        return max(_HYSTERESIS, _errors_to_exceed(self.world_size) * math.hypot(*errors))

    def _models(self) -> tuple[StepTimeModel, ...]:
        return tuple(rank.model() for rank in self._ranks)

    def models(self) -> tuple[StepTimeModel, ...] | None:
        """The models of own work as they are now, one a rank; None before the first useful measurement."""
        return self._models() if self._observed else None

    def tails(self) -> tuple[float, ...]:
        """W seconds that each rank communicates when all others wait for it; 0 while nothing is known of any.

        A rank that never was the last is taken to be like the others.
        """
        known = [rank.tail() for rank in self._ranks]
        usual = median([tail for tail in known if tail is not None] or [0.0])
        return tuple(usual if tail is None else tail for tail in known)

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
            "version": STATE_VERSION,
            "world_size": self.world_size,
            "global_batch": self.global_batch,
            "measured": [[[b, list(seconds)] for b, seconds in rank.seconds.items()] for rank in self._ranks],
            "tails": [list(rank.tails) for rank in self._ranks],
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
        expected = {"version": STATE_VERSION, "world_size": self.world_size, "global_batch": self.global_batch}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(f"cannot load a balancer's state of {name} {state.get(name)!r} into one of {value}")
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"a balancer's state has the entries {sorted(self.state_dict())}, got {sorted(state)}")
        try:
            ranks = [
                RankMeasurements({int(b): [float(v) for v in s] for b, s in measured}, [float(v) for v in tails])
                for measured, tails in zip(state["measured"], state["tails"], strict=False)
            ]
            observed = tuple(int(b) for b in state["observed"])
            if observed and (len(observed) != self.world_size or sum(observed) != self.global_batch):
                raise ValueError(f"a balancer's state observed {observed}, no split of {self.global_batch} samples")
            if any(not (math.isfinite(tail) and tail >= 0) for rank in ranks for tail in rank.tails):
                raise ValueError("a balancer's state has tails that can't have been measured")
            counters = int(state["times_observed"]), int(state["quick_plans"]), bool(state["drifted"])
        except TypeError as error:
            raise ValueError(f"a balancer's state is damaged: {error}") from None
        complete = len(state["measured"]) == len(state["tails"]) == self.world_size
        if not complete or any(bool(rank.seconds) != bool(observed) for rank in ranks):
            raise ValueError(f"a balancer's state needs measurements of all {self.world_size} ranks, or of none")
        for rank in ranks:
            for b, seconds in rank.seconds.items():
                if not seconds:
                    raise ValueError(f"a balancer's state has no measurements of a local batch of {b}")
                StepTimeModel.fit([b] * len(seconds), seconds)  # raises for what cannot have been measured
        self._ranks, self._observed = ranks, observed
        self._times_observed, self._quick_plans, self._drifted = counters
        self._calm = self._times_observed
        self._first = None
