"""From shares and the ranks' reports to the schedule of plans; pure, the same on every rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.balancer import Balancer
from lightning_hetero.planning.memory import Caps, MemoryLimits
from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.planning.reports import MeasuredStep, MeasurementJoin, StepReports
from lightning_hetero.planning.shares import Shares
from lightning_hetero.planning.step_time import StepTimeModel


@dataclass(frozen=True)
class PlanUpdate:
    """What follows from the messages of a step.

    Attributes:
        plans: that have been decided, oldest first; they are in the schedule already.
        warnings: sentences for the user, each to be said once.
        measured: steps that every rank has reported now, oldest first.
    """

    plans: tuple[Plan, ...] = ()
    warnings: tuple[str, ...] = ()
    measured: tuple[MeasuredStep, ...] = ()


class Planner(Protocol):
    """What a fit asks of whoever decides its plans; answers are the same on all ranks."""

    @property
    def global_batch(self) -> int | None:
        """Samples of a step over all ranks; None where the user shards, since nobody knows."""

    @property
    def is_exploring(self) -> bool:
        """Whether it would use measurements before the next batch is drawn."""

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether W local batches are known to fit on all ranks."""

    def update(self, reports: StepReports) -> PlanUpdate:
        """Take in what all ranks report with the messages of a step.

        Raises:
            ValueError: the global batch does not fit into the memory of all ranks together.
        """


class UserSharded:
    """Stands for data that the user shards: there are no plans, and nothing is decided."""

    global_batch: None = None
    is_exploring = False

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:  # noqa: ARG002 - of the protocol
        """Never: nothing is known."""
        return False

    def update(self, reports: StepReports) -> PlanUpdate:  # noqa: ARG002 - of the protocol
        """Nothing follows."""
        return PlanUpdate()


def check_global_batch(global_batch: int, world_size: int) -> None:
    """See that every rank can have a sample.

    Raises:
        ValueError: they can't, in one sentence.
    """
    if global_batch < world_size:
        raise ValueError(
            f"global_batch={global_batch} is smaller than the number of ranks, {world_size}: raise global_batch or the "
            "loader's batch_size, or use fewer devices"
        )


class SplitPlanner:
    """Decides how the global batches of a run are split, adaptively or in fixed proportions.

    Args:
        shares: the user's.
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
        ValueError: the global batch can't be split so, or the profile is of another job or damaged.
        KeyError: the profile is damaged.
        TypeError: the same.
    """

    FUTILE_MESSAGES = 8
    """Messages in a row without a complete step after which it asks for no more before each batch: every batch may be a
    short one, which is not measured. Chosen."""

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
        self.world_size = world_size
        self.global_batch = global_batch
        self.minimum = max(1, min(minimum, global_batch // world_size))
        self.granularity = granularity
        # A multiple of the granularity that reaches the minimum is the least that a plan can give.
        self._least = -(-self.minimum // granularity) * granularity
        self._reason = "equal" if shares.proportions is None else "shares"
        self._memory = memory
        self.caps = self._fresh_caps()
        self._join = MeasurementJoin(world_size)
        self._adaptive = shares.adaptive and world_size > 1
        self._balancer = self._fresh_balancer(profile)
        self._has_profile = self._balancer is not None and profile is not None
        self._discards_profile = False  # with the next update
        self._drawn_ahead: int | None = None  # steps that loaders have drawn beyond that of the last messages
        self._futile_messages = 0  # in a row without a complete step
        self.schedule = Schedule(self._first_plan(profile, speeds))

    def _fresh_caps(self) -> Caps | None:
        if self._memory is None:
            return None
        return Caps(self._memory, self.global_batch, minimum=self._least, granularity=self.granularity)

    def _fresh_balancer(self, profile: Mapping[str, Any] | None) -> Balancer | None:
        if not self._adaptive:
            return None
        return Balancer(
            self.world_size, self.global_batch, minimum=self._least, granularity=self.granularity, state=profile
        )

    def _first_plan(self, profile: Mapping[str, Any] | None, speeds: Sequence[float] | None) -> Plan:
        if self._balancer is not None and profile is not None:
            proposal = self._balancer.first_proposal()
            return Plan(0, proposal.local_batches, proposal.predicted_seconds, proposal.reason)
        given = self._proportional(self._proportions)
        if self._balancer is not None and speeds is not None:
            split = self._balancer.split_from_speeds(speeds, given)
            if split != given:
                return Plan(0, split, reason="probe")
        return Plan(0, given, reason=self._reason)

    def forget_memory(self) -> None:
        """Another fit begins: its samples may be larger, so what was seen of memory no longer holds."""
        self.caps = self._fresh_caps()

    def discard_profile(self) -> None:
        """Forget what the profile brought, since it is of another job.

        The next `update` plans equal shares, from the first step that no loader has drawn. Without a profile nothing
        changes.
        """
        self._discards_profile = self._has_profile

    @property
    def is_exploring(self) -> bool:
        """Whether it would use measurements before the next batch is drawn.

        It would while it looks for the right plan, where loaders have not drawn that batch.
        """
        undrawn = self._drawn_ahead is not None and self._drawn_ahead <= 0
        hopeful = self._futile_messages < self.FUTILE_MESSAGES
        return undrawn and hopeful and self._balancer is not None and self._balancer.is_exploring

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether W local batches are known to fit on all ranks; see `memory.Caps.fits_in_memory`."""
        return self.caps is not None and self.caps.fits_in_memory(local_batches)

    def update(self, reports: StepReports) -> PlanUpdate:
        """Take in what all ranks report with the messages of a step.

        Raises:
            ValueError: the global batch does not fit into the memory of all ranks together.
        """
        drawn = reports.last_drawn
        self._drawn_ahead = drawn - reports.step
        restarted = self._plan_anew(drawn) if self._discards_profile else None
        warnings = self.caps.update(reports.memory) if self.caps is not None else ()
        within = self._keep_to_caps(drawn)
        measured = self._join.add(reports, self.schedule)
        better = self._balance(measured, drawn)
        plans = tuple(plan for plan in (restarted, within, better) if plan is not None)
        return PlanUpdate(plans, warnings, measured)

    def models(self) -> tuple[StepTimeModel, ...] | None:
        """W models of compute time by local batch; None where nothing is known, and with fixed shares."""
        return self._balancer.models() if self._balancer is not None else None

    def exposed_communication(self) -> tuple[float, ...]:
        """W seconds that each rank communicates when all others wait for it; 0 for unknown."""
        return self._balancer.exposed_communication() if self._balancer is not None else (0.0,) * self.world_size

    def state_dict(self) -> dict[str, Any] | None:
        """What was measured, for a later run of the same job; None where nothing was, and with fixed shares."""
        return self._balancer.state_dict() if self._balancer is not None and self._balancer.models() else None

    def _plan_anew(self, drawn: int) -> Plan:
        """Forget the profile: equal shares, and a balancer that knows nothing."""
        self._balancer = self._fresh_balancer(None)
        self._has_profile = self._discards_profile = False
        return self._append(drawn, self._proportional(self._proportions), None, self._reason)

    def _keep_to_caps(self, drawn: int) -> Plan | None:
        """Replace the newest plan at once where it asks a rank for more than its memory allows."""
        newest, caps = self.schedule.newest, self._maximum()
        if caps is None or all(map(int.__le__, newest.local_batches, caps)):
            return None
        proposal = self._balancer.propose(newest.local_batches, caps) if self._balancer is not None else None
        if proposal is not None:
            return self._append(drawn, proposal.local_batches, proposal.predicted_seconds, "memory")
        # What was in force is the best that is known, or what the user wants: the surplus is spread in proportion.
        shares = newest.local_batches if self._balancer is not None else self._proportions
        return self._append(drawn, self._proportional(shares, caps), None, "memory")

    def _balance(self, measured: Sequence[MeasuredStep], drawn: int) -> Plan | None:
        """Ask the balancer for a better plan where a step has become known of all ranks."""
        self._futile_messages = 0 if measured else self._futile_messages + 1
        if self._balancer is None or not measured:
            return None
        for step in measured:
            self._balancer.observe(step)
        proposal = self._balancer.propose(self.schedule.newest.local_batches, self._maximum())
        if proposal is None:
            return None
        return self._append(drawn, proposal.local_batches, proposal.predicted_seconds, proposal.reason)

    def _maximum(self) -> tuple[int, ...] | None:
        return self.caps.maximum(self.schedule.newest.local_batches) if self.caps is not None else None

    def _proportional(self, shares: Sequence[float], maximum: Sequence[int] | None = None) -> tuple[int, ...]:
        return proportional(
            self.global_batch, shares, minimum=self._least, maximum=maximum, granularity=self.granularity
        )

    def _append(
        self, drawn: int, local_batches: tuple[int, ...], seconds: tuple[float, ...] | None, reason: str
    ) -> Plan:
        plan = Plan(max(drawn + 1, self.schedule.newest.first_step), local_batches, seconds, reason)
        self.schedule.append(plan)
        return plan
