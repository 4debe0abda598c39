"""Turns shares and the ranks' reports into the schedule of plans; pure, the same on every rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.balancer import Balancer
from lightning_hetero.planning.memory import Caps, MemoryLimits
from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.planning.reports import MeasuredStep, MeasurementJoin, StepReports
from lightning_hetero.planning.shares import Shares
from lightning_hetero.planning.step_time import StepTimeModel


@dataclass(frozen=True)
class PlanUpdate:
    """What follows from the messages of a step; all tuples are oldest first."""

    plans: tuple[Plan, ...] = ()  # newly decided, and already in the schedule
    warnings: tuple[str, ...] = ()  # messages for the user
    measured: tuple[MeasuredStep, ...] = ()  # steps that every rank has now reported


def check_global_batch(global_batch: int, world_size: int) -> None:
    """Raise a ValueError if not every rank can have a sample."""
    if global_batch < world_size:
        raise ValueError(
            f"global_batch={global_batch} is smaller than the number of ranks, {world_size}: raise global_batch or the "
            "loader's batch_size, or use fewer devices"
        )


class SplitPlanner:
    """Decides how the global batches of a run are split, adaptively or in fixed proportions.

    Args:
        shares: the user's option.
        world_size: W.
        global_batch: samples in a step over all ranks.
        minimum: the fewest samples that a rank can compute with; lowered if the global batch is too small for that.
        granularity: local batches are multiples of it.
        profile: the state that an earlier run of the same job has saved, see `state_dict`; if shares are adaptive, the
            first plan follows from it.
        speeds: W results of a speed test of the ranks; if shares are adaptive and there is no profile, the first plan
            follows from them.
        memory: the memory that the ranks' devices may use; None for no caps.

    Raises:
        ValueError: the global batch has no such split, or the profile is of another job or damaged. A damaged profile
            may also raise a KeyError or a TypeError.
    """

    FUTILE_MESSAGES = 8
    """After the messages of this many steps in a row complete no measured step, it stops exploring: every batch may be
    a short one, which is not measured. Chosen."""

    def __init__(
        self,
        shares: Shares,
        world_size: int,
        global_batch: int,
        *,
        minimum: int = 1,
        granularity: int = 1,
        profile: Mapping[str, Any] | None = None,
        speeds: Sequence[float] | None = None,
        memory: MemoryLimits | None = None,
    ) -> None:
        self._proportions = shares.proportions_for(world_size)
        check_global_batch(global_batch, world_size)
        self.world_size, self.global_batch, self.granularity = world_size, global_batch, granularity
        self.minimum = max(1, min(minimum, global_batch // world_size))
        # The smallest local batch of a plan: the minimum, rounded up to a multiple of the granularity.
        self.least = -(-self.minimum // granularity) * granularity
        self._memory = memory
        self.forget_memory()
        self._join = MeasurementJoin(world_size)
        reason = "equal" if shares.proportions is None else "shares"
        first = self._unmeasured = Plan(0, self._proportional(self._proportions), reason=reason)
        adaptive = shares.adaptive and world_size > 1
        self._balancer = self._new_balancer(profile) if adaptive else None
        self.has_profile = adaptive and profile is not None  # and has not discarded it
        if self._balancer is not None and profile is not None:
            first = self._balancer.first_plan()
        elif self._balancer is not None and speeds is not None:
            split = self._balancer.split_from_speeds(speeds, first.local_batches)
            first = Plan(0, split, reason="probe") if split != first.local_batches else first
        self._discards_profile = False  # in the next update
        self._next_is_undrawn = False  # whether no loader has drawn the batch after the step of the last messages
        self._futile_messages = 0  # in a row without a complete step
        self.schedule = Schedule(first)

    def _new_balancer(self, profile: Mapping[str, Any] | None) -> Balancer:
        least, granularity = self.least, self.granularity
        return Balancer(self.world_size, self.global_batch, minimum=least, granularity=granularity, state=profile)

    def forget_memory(self) -> None:
        """Drop what is known about memory, for another fit: its samples may be larger."""
        self.caps: Caps | None = None
        if self._memory is not None:
            least, granularity = self.least, self.granularity
            self.caps = Caps(self._memory, self.global_batch, minimum=least, granularity=granularity)

    def discard_profile(self) -> None:
        """Drop the profile's measurements, since they are from another job; without a profile this does nothing.

        The next `update` plans equal shares, from the first step that no loader has drawn.
        """
        self._discards_profile = self.has_profile

    @property
    def is_exploring(self) -> bool:
        """Whether it is searching for the right plan, and could use measurements before loaders draw the next batch."""
        in_time = self._next_is_undrawn and self._futile_messages < self.FUTILE_MESSAGES
        return in_time and self._balancer is not None and self._balancer.is_exploring

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether W local batches are known to fit on all ranks, see `Caps.fits_in_memory`."""
        return self.caps is not None and self.caps.fits_in_memory(local_batches)

    def update(self, reports: StepReports) -> PlanUpdate:
        """Process what all ranks report with the messages of a step.

        Raises:
            ValueError: the global batch does not fit in the memory of all ranks together.
        """
        self._next_is_undrawn = reports.last_drawn <= reports.step
        decided = len(self.schedule.plans)
        start = max(reports.last_drawn + 1, self.schedule.newest.first_step)
        if self._discards_profile:
            self.has_profile = self._discards_profile = False
            self._balancer = self._new_balancer(None)
            self.schedule.append(replace(self._unmeasured, first_step=start))
        warnings = self.caps.update(reports.memory) if self.caps is not None else ()
        self._keep_to_caps(start)
        measured = self._join.add(reports, self.schedule)
        self._futile_messages = 0 if measured else self._futile_messages + 1
        if self._balancer is not None and measured:
            for step in measured:
                self._balancer.observe(step)
            newest, maximum = self.schedule.newest.local_batches, self._maximum()
            if (plan := self._balancer.propose(newest, maximum, first_step=start)) is not None:
                self.schedule.append(plan)
        return PlanUpdate(self.schedule.plans[decided:], warnings, measured)

    def models(self) -> tuple[StepTimeModel, ...] | None:
        """W models of compute time by local batch; None before anything is measured, and with fixed shares."""
        return self._balancer.models() if self._balancer is not None else None

    def exposed_communication(self) -> tuple[float, ...]:
        """W seconds that each rank communicates while all others wait for it; 0 for unknown."""
        return self._balancer.exposed_communication() if self._balancer is not None else (0.0,) * self.world_size

    def state_dict(self) -> dict[str, Any] | None:
        """The measurements, for a later run of the same job; None if there are none, and with fixed shares."""
        return self._balancer.state_dict() if self._balancer is not None and self._balancer.models() else None

    def _keep_to_caps(self, start: int) -> None:
        """Replace the newest plan if it exceeds what a rank's memory allows."""
        newest, caps = self.schedule.newest.local_batches, self._maximum()
        if caps is None or all(map(int.__le__, newest, caps)):
            return
        plan = self._balancer.propose(newest, caps, first_step=start) if self._balancer is not None else None
        if plan is not None:
            self.schedule.append(replace(plan, reason="memory"))
        else:
            # The newest split is the best one known, and fixed shares are the user's choice: the surplus is spread in
            # proportion to them.
            shares = newest if self._balancer is not None else self._proportions
            self.schedule.append(Plan(start, self._proportional(shares, caps), reason="memory"))

    def _maximum(self) -> tuple[int, ...] | None:
        return self.caps.maximum(self.schedule.newest.local_batches) if self.caps is not None else None

    def _proportional(self, shares: Sequence[float], maximum: Sequence[int] | None = None) -> tuple[int, ...]:
        return proportional(
            self.global_batch, shares, minimum=self.least, maximum=maximum, granularity=self.granularity
        )


class UserSharded:
    """The planner for data that the user shards: there are no plans, and nothing is ever decided."""

    global_batch: None = None
    is_exploring = False

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:  # noqa: ARG002 - as `SplitPlanner`
        """Always False: nothing is known about memory."""
        return False

    def update(self, reports: StepReports) -> PlanUpdate:  # noqa: ARG002 - as `SplitPlanner`
        """An empty update."""
        return PlanUpdate()


Planner: TypeAlias = SplitPlanner | UserSharded
"""Decides the plans of a fit; its answers are the same on all ranks."""
