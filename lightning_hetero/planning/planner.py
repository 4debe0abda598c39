"""From the user's `shares` and the ranks' measurements to the schedule of plans; pure, the same on every rank."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.balancer import Balancer
from lightning_hetero.planning.memory import Caps, Report
from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.planning.reports import StepReports
from lightning_hetero.planning.step_time import StepTimeModel

Shares = str | Sequence[float]
"""What a user may say of the shares; see `check_shares`."""


def profile_path(shares: Shares) -> str | None:
    """The profile that `shares` names, to begin from; None where it names none."""
    return shares if isinstance(shares, str) and shares.endswith(".json") else None


def learns(shares: Shares) -> bool:
    """Whether the shares are to be learnt."""
    return shares == "auto" or profile_path(shares) is not None


def check_shares(shares: Shares, world_size: int | None = None) -> None:
    """See that `shares` can be used.

    Args:
        shares: "auto", "equal", one number a rank, or the path of a profile to begin from.
        world_size: W, once it is known.

    Raises:
        ValueError: they can't, in one sentence.
    """
    if isinstance(shares, str):
        if shares != "equal" and not learns(shares):
            raise ValueError(
                f"shares={shares!r} is unknown: use 'auto', 'equal', one number a rank such as [4, 1], or the path of a"
                " profile.json"
            )
        return
    try:
        values = [float(share) for share in shares]
    except (TypeError, ValueError):
        raise ValueError(f"shares={shares!r} has to be 'auto', 'equal', or one number a rank such as [4, 1]") from None
    for rank, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"shares={list(shares)}: the share of rank {rank} is {value:g}; give a number of 0 or more"
            )
    if sum(values) <= 0:
        raise ValueError(f"shares={list(shares)} add up to 0; at least one rank needs a share above 0")
    if world_size is not None and len(values) != world_size:
        raise ValueError(
            f"shares={list(shares)} has {len(values)} number{'s' if len(values) != 1 else ''}, but there "
            f"{'are' if world_size != 1 else 'is'} {world_size} rank{'s' if world_size != 1 else ''}: give one a rank"
        )


@dataclass(frozen=True)
class News:
    """What follows from the messages of a step.

    Attributes:
        sentences: to be said once.
        plans: that have been decided, oldest first.
    """

    sentences: tuple[str, ...]
    plans: tuple[Plan, ...]


class Planner:
    """Decides the plans of a run.

    Args:
        shares: see `check_shares`.
        world_size: W.
        global_batch: samples of a step over all ranks.
        minimum: the least that a rank can compute with; less where the global batch does not give each as much.
        granularity: local batches are multiples of it.
        known: what an earlier run of the same job has learnt, see `state_dict`; the first plan follows from it.
        speeds: W numbers that a probe of the ranks has found, of which the first plan makes something where nothing
            else is known and shares are learnt; None for none.
        memory: from the global batch and the least local batch to the caps of all ranks; None for no caps.

    Raises:
        ValueError: the global batch can't be split so, or what is known is damaged.
    """

    PATIENCE = 64
    """Steps after which a measurement that not all ranks have is given up."""

    IN_VAIN = 8
    """Messages in a row without a whole step after which it asks no more; every batch may be a short one."""

    def __init__(
        self,
        shares: Shares,
        world_size: int,
        global_batch: int,
        *,
        minimum: int = 1,
        granularity: int = 1,
        known: Mapping[str, Any] | None = None,
        speeds: Sequence[float] | None = None,
        memory: Callable[[int, int], Caps] | None = None,
    ) -> None:
        check_shares(shares, world_size)
        if global_batch < world_size:
            raise ValueError(
                f"a global batch of {global_batch} is smaller than the number of ranks, {world_size}: raise "
                "global_batch or the loader's batch_size, or use fewer devices"
            )
        self.world_size = world_size
        self.global_batch = global_batch
        self.minimum = max(1, min(minimum, global_batch // world_size))
        # A multiple of the granularity that reaches the minimum is the least that a plan can give.
        least = -(-self.minimum // granularity) * granularity
        self._least, self._granularity = least, granularity
        self._fixed = [1.0] * world_size if isinstance(shares, str) else [float(share) for share in shares]
        local_batches = proportional(global_batch, self._fixed, minimum=least, granularity=granularity)
        first = Plan(0, local_batches, reason="equal" if isinstance(shares, str) else "shares")
        self._balancer = (
            Balancer(world_size, global_batch, minimum=least, granularity=granularity)
            if learns(shares) and world_size > 1
            else None
        )
        self._memory = memory
        self.forget_memory()
        if self._balancer is not None and known is not None:
            proposal = self._balancer.start_from(known)
            first = Plan(0, proposal.local_batches, proposal.predicted_seconds, proposal.reason)
        elif self._balancer is not None and speeds is not None:
            guessed = self._balancer.guess(speeds, local_batches)
            first = Plan(0, guessed, reason="probe") if guessed != local_batches else first
        self._ahead: int | None = None  # steps that loaders have drawn beyond the last one heard of
        self._in_vain = 0  # times in a row that ranks told of no whole step
        self.schedule = Schedule(first)
        self._told: dict[int, dict[int, tuple[float, float, float]]] = {}

    def forget_memory(self) -> None:
        """Another fit begins: its samples may be larger, so what was seen of memory no longer holds."""
        self.caps = self._memory(self.global_batch, self._least) if self._memory is not None else None

    def update(self, reports: StepReports) -> News:
        """All ranks' messages of a step: what they say of their memory and of their work.

        Raises:
            ValueError: the global batch does not fit into the memory of all ranks together.
        """
        drawn = reports.last_drawn
        self._ahead = drawn - reports.step
        of_memory = reports.memory
        told = zip(
            of_memory.local_batches.tolist(),
            of_memory.peaks.tolist(),
            of_memory.resting.tolist(),
            of_memory.fits.tolist(),
            of_memory.fails.tolist(),
            strict=True,
        )
        sentences = self.caps.update([Report(*row) for row in told]) if self.caps is not None else ()
        within = self.fit_into_memory(drawn)
        measured, seconds = reports.measured_steps.tolist(), reports.compute_seconds.tolist()
        averaging, apart = reports.sync_seconds.tolist(), reports.averaged_after_backward.tolist()
        better = self.observe(measured, seconds, drawn, averaging, apart)
        return News(sentences, tuple(plan for plan in (within, better) if plan is not None))

    @property
    def wants_reports_now(self) -> bool:
        """Whether it would use what ranks have measured before the next batch is drawn; the same on all ranks.

        It does while it looks for the right plan, where loaders have not drawn that batch.
        """
        waits = self._ahead is not None and self._ahead <= 0 and self._in_vain < self.IN_VAIN
        return waits and self._balancer is not None and self._balancer.is_exploring

    def fits_in_memory(self, local_batches: Sequence[int]) -> bool:
        """Whether all ranks are sure to have memory for W local batches; see `memory.Caps.fits_in_memory`."""
        return self.caps is not None and self.caps.fits_in_memory(local_batches)

    def fit_into_memory(self, drawn: int) -> Plan | None:
        """See that the newest plan keeps to the caps, and make one that does where it doesn't; at once, and by itself.

        Args:
            drawn: the last step that any rank's loaders have handed out.

        Returns:
            The new plan, already in the schedule, or None.
        """
        newest = self.schedule.newest
        caps = self._maximum()
        if caps is None or all(map(int.__le__, newest.local_batches, caps)):
            return None
        proposal = self._balancer.propose(newest.local_batches, caps) if self._balancer is not None else None
        if proposal is not None:
            return self._append(drawn, proposal.local_batches, proposal.predicted_seconds, "memory")
        # What was in force is the best that is known, or what the user wants: the surplus is spread in proportion.
        shares = newest.local_batches if self._balancer is not None else self._fixed
        split = proportional(
            self.global_batch, shares, minimum=self._least, maximum=caps, granularity=self._granularity
        )
        return self._append(drawn, split, None, "memory")

    def observe(
        self,
        steps: Sequence[int],
        seconds: Sequence[float],
        drawn: int,
        averaging: Sequence[float] | None = None,
        apart: Sequence[float] | None = None,
    ) -> Plan | None:
        """Take in what ranks have measured, and decide once a step is known of all of them.

        Args:
            steps: W numbers, the step that each rank tells of; -1 for none. Each was a full global batch.
            seconds: W numbers, the rank's own work in that step.
            drawn: the last step that any rank's loaders have handed out.
            averaging: W numbers, the seconds between its last gradient and the averaged ones; 0 or None for unknown.
            apart: W numbers, 1 where these came after the backward pass, and nothing was averaged during it.

        Returns:
            The new plan, already in the schedule, or None.
        """
        if self._balancer is None:
            return None
        unknown = [0.0] * self.world_size
        for rank, told in enumerate(zip(seconds, averaging or unknown, apart or unknown, strict=True)):
            if steps[rank] >= 0:  # ranks may be some steps behind each other in telling
                self._told.setdefault(steps[rank], {})[rank] = told
        complete = [step for step, told in self._told.items() if len(told) == self.world_size]
        for step in complete:
            known = self._told.pop(step)
            own, waits, after = zip(*(known[rank] for rank in range(self.world_size)), strict=True)
            self._balancer.observe(step, self.schedule.at(step).local_batches, own, waits, apart=any(after))
        for step in [step for step in self._told if step < max(steps) - self.PATIENCE]:
            del self._told[step]
        self._in_vain = 0 if complete else self._in_vain + 1
        return self._decide(drawn) if complete else None

    def models(self) -> tuple[StepTimeModel, ...] | None:
        """Each rank's own work by local batch, as far as it is known; None where nothing is learnt."""
        return self._balancer.models() if self._balancer is not None else None

    def tails(self) -> tuple[float, ...]:
        """W seconds that each rank communicates when all others wait for it; 0 for unknown."""
        return self._balancer.tails() if self._balancer is not None else (0.0,) * self.world_size

    def state_dict(self) -> dict[str, Any] | None:
        """What was learnt, for a later run of the same job; None where nothing was."""
        return self._balancer.state_dict() if self._balancer is not None and self._balancer.models() else None

    def _decide(self, drawn: int) -> Plan | None:
        assert self._balancer is not None
        newest = self.schedule.newest
        proposal = self._balancer.propose(newest.local_batches, self._maximum())
        if proposal is None:
            return None
        return self._append(drawn, proposal.local_batches, proposal.predicted_seconds, proposal.reason)

    def _maximum(self) -> tuple[int, ...] | None:
        return self.caps.maximum(self.schedule.newest.local_batches) if self.caps is not None else None

    def _append(
        self, drawn: int, local_batches: tuple[int, ...], seconds: tuple[float, ...] | None, reason: str
    ) -> Plan:
        plan = Plan(max(drawn + 1, self.schedule.newest.first_step), local_batches, seconds, reason)
        self.schedule.append(plan)
        return plan
