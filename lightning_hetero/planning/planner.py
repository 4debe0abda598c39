"""From shares and the ranks' reports to the schedule of plans; pure, the same on every rank."""

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
    """What follows from the messages of a step, oldest first."""

    plans: tuple[Plan, ...] = ()  # that have been decided; they are in the schedule already
    warnings: tuple[str, ...] = ()  # sentences for the user
    measured: tuple[MeasuredStep, ...] = ()  # steps that every rank has reported now


def check_global_batch(global_batch: int, world_size: int) -> None:
    """Raise a ValueError, one sentence, where not every rank can have a sample."""
    if global_batch < world_size:
        raise ValueError(
            f"global_batch={global_batch} is smaller than the number of ranks, {world_size}: raise global_batch or the "
            "loader's batch_size, or use fewer devices"
        )


class SplitPlanner:
    """Decides how the global batches of a run are split, adaptively or in fixed proportions.

    Args:
        shares: as the user wants them.
        world_size: W.
        global_batch: samples of a step over all ranks.
        minimum: the least that a rank can compute with; less where the global batch does not give each as much.
        granularity: local batches are multiples of it.
        profile: the state that an earlier run of the same job has saved, see `state_dict`; where shares are adaptive,
            the first plan follows from it.
        speeds: W numbers that a speed test of the ranks has found; where shares are adaptive and there is no profile,
            the first plan follows from them.
        memory: what the ranks' devices may hold; None for no caps.

    Raises:
        ValueError: the global batch can't be split so, or the profile is of another job or damaged. A damaged profile
            may also raise a KeyError or a TypeError.
    """

    FUTILE_MESSAGES = 8
    """Messages in a row without a complete step after which it stops exploring: every batch may be a short one, which
    is not measured. Chosen."""

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
        # A multiple of the granularity that reaches the minimum is the least that a plan can give.
        self._least = -(-self.minimum // granularity) * granularity
        self._memory = memory
        self.forget_memory()
        self._join = MeasurementJoin(world_size)
        reason = "equal" if shares.proportions is None else "shares"
        first = self._unmeasured = Plan(0, self._proportional(self._proportions), reason=reason)
        adaptive = shares.adaptive and world_size > 1
        self._balancer = self._new_balancer(profile) if adaptive else None
        self._has_profile = adaptive and profile is not None
        if self._balancer is not None and profile is not None:
            first = self._balancer.first_plan()
        elif self._balancer is not None and speeds is not None:
            split = self._balancer.split_from_speeds(speeds, first.local_batches)
            first = Plan(0, split, reason="probe") if split != first.local_batches else first
        self._discards_profile = False  # with the next update
        self._next_is_undrawn = False  # whether no loader has drawn the batch after that of the last messages
        self._futile_messages = 0  # in a row without a complete step
        self.schedule = Schedule(first)

    def _new_balancer(self, profile: Mapping[str, Any] | None) -> Balancer:
        least, granularity = self._least, self.granularity
        return Balancer(self.world_size, self.global_batch, minimum=least, granularity=granularity, state=profile)

    def forget_memory(self) -> None:
        """Another fit begins: its samples may be larger, so what was seen of memory no longer holds."""
        self.caps: Caps | None = None
        if self._memory is not None:
            least, granularity = self._least, self.granularity
            self.caps = Caps(self._memory, self.global_batch, minimum=least, granularity=granularity)

    def discard_profile(self) -> None:
        """Forget what the profile brought, since it is of another job; without a profile nothing changes.

        The next `update` plans equal shares, from the first step that no loader has drawn.
        """
        self._discards_profile = self._has_profile

    @property
    def is_exploring(self) -> bool:
        """Whether it looks for the right plan, and can use measurements before any loader draws the next batch."""
        in_time = self._next_is_undrawn and self._futile_messages < self.FUTILE_MESSAGES
        return in_time and self._balancer is not None and self._balancer.is_exploring

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether W local batches are known to fit on all ranks, see `Caps.fits_in_memory`."""
        return self.caps is not None and self.caps.fits_in_memory(local_batches)

    def update(self, reports: StepReports) -> PlanUpdate:
        """Take in what all ranks report with the messages of a step.

        Raises:
            ValueError: the global batch does not fit into the memory of all ranks together.
        """
        self._next_is_undrawn = reports.last_drawn <= reports.step
        decided = len(self.schedule.plans)
        start = max(reports.last_drawn + 1, self.schedule.newest.first_step)
        if self._discards_profile:
            self._has_profile = self._discards_profile = False
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
        """W models of compute time by local batch; None where nothing is known, and with fixed shares."""
        return self._balancer.models() if self._balancer is not None else None

    def exposed_communication(self) -> tuple[float, ...]:
        """W seconds that each rank communicates when all others wait for it; 0 for unknown."""
        return self._balancer.exposed_communication() if self._balancer is not None else (0.0,) * self.world_size

    def state_dict(self) -> dict[str, Any] | None:
        """What was measured, for a later run of the same job; None where nothing was, and with fixed shares."""
        return self._balancer.state_dict() if self._balancer is not None and self._balancer.models() else None

    def _keep_to_caps(self, start: int) -> None:
        """Replace the newest plan where it asks a rank for more than its memory allows."""
        newest, caps = self.schedule.newest.local_batches, self._maximum()
        if caps is None or all(map(int.__le__, newest, caps)):
            return
        plan = self._balancer.propose(newest, caps, first_step=start) if self._balancer is not None else None
        if plan is not None:
            self.schedule.append(replace(plan, reason="memory"))
        else:
            # The newest split is the best that is known, fixed shares are what the user wants: the surplus is spread
            # in proportion.
            shares = newest if self._balancer is not None else self._proportions
            self.schedule.append(Plan(start, self._proportional(shares, caps), reason="memory"))

    def _maximum(self) -> tuple[int, ...] | None:
        return self.caps.maximum(self.schedule.newest.local_batches) if self.caps is not None else None

    def _proportional(self, shares: Sequence[float], maximum: Sequence[int] | None = None) -> tuple[int, ...]:
        return proportional(
            self.global_batch, shares, minimum=self._least, maximum=maximum, granularity=self.granularity
        )


class UserSharded:
    """Stands for data that the user shards: there are no plans, and nothing is decided."""

    global_batch: None = None
    is_exploring = False

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:  # noqa: ARG002 - as `SplitPlanner`
        """Never: nothing is known."""
        return False

    def update(self, reports: StepReports) -> PlanUpdate:  # noqa: ARG002 - as `SplitPlanner`
        """Nothing follows."""
        return PlanUpdate()


Planner: TypeAlias = SplitPlanner | UserSharded
"""Whatever decides the plans of a fit; its answers are the same on all ranks."""
