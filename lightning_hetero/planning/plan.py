"""A plan says how a global batch is split over the ranks; a schedule says which plan holds at which step."""

from bisect import bisect_right
from dataclasses import dataclass
from zlib import crc32


@dataclass(frozen=True)
class Plan:
    """The local batch of every rank, and the step from which they hold.

    Args:
        first_step: the first global batch that is split this way, counted from 0 over the whole run.
        local_batches: W numbers of samples, one per rank; their sum is the global batch.
        predicted_seconds: W compute times, in seconds, that the step-time models predict; None before there are any.
        reason: why this plan was made, for the log: "equal", "shares" (the user's), "probe" (a speed test), "profile"
            (measurements of an earlier run), "explore" (to separate fixed cost from cost per sample), "balance",
            "drift" (a rank's speed has changed), or "memory" (the last plan exceeded what a rank's memory allows).
    """

    first_step: int
    local_batches: tuple[int, ...]
    predicted_seconds: tuple[float, ...] | None = None
    reason: str = "equal"

    def __post_init__(self) -> None:
        if self.first_step < 0:
            raise ValueError(f"a plan can't start at step {self.first_step}")
        if not self.local_batches or min(self.local_batches) < 0 or sum(self.local_batches) < 1:
            raise ValueError(f"local batches {self.local_batches} are not a split of a global batch")
        if self.predicted_seconds is not None and len(self.predicted_seconds) != len(self.local_batches):
            raise ValueError(
                f"{len(self.predicted_seconds)} predicted times for {len(self.local_batches)} ranks: they must match"
            )

    @property
    def global_batch(self) -> int:
        """Samples in one step over all ranks."""
        return sum(self.local_batches)

    @property
    def world_size(self) -> int:
        """W, the number of ranks."""
        return len(self.local_batches)

    @property
    def checksum(self) -> int:
        """A number that differs between different splits; ranks compare it at every step."""
        return crc32(repr(self.local_batches).encode())


class Schedule:
    """The plans of a run, starting with `first`; plans are only ever added at the end."""

    def __init__(self, first: Plan) -> None:
        if first.first_step != 0:
            raise ValueError(f"the first plan has to hold from step 0, not from step {first.first_step}")
        self._plans = [first]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans so far, oldest first."""
        return tuple(self._plans)

    @property
    def newest(self) -> Plan:
        """The plan that was decided last; it may not be in force yet."""
        return self._plans[-1]

    def at(self, step: int) -> Plan:
        """The plan in force at a step."""
        if step < 0:
            raise ValueError(f"there is no step {step}")
        return self._plans[bisect_right(self._plans, step, key=lambda plan: plan.first_step) - 1]

    def append(self, plan: Plan) -> None:
        """Add a plan of the same global batch and world size; it must not start before the newest plan."""
        newest = self._plans[-1]
        if plan.first_step < newest.first_step:
            raise ValueError(f"a plan for step {plan.first_step} comes after one for step {newest.first_step}")
        if (plan.global_batch, plan.world_size) != (newest.global_batch, newest.world_size):
            raise ValueError(
                f"a plan for {plan.global_batch} samples on {plan.world_size} ranks can't follow one for "
                f"{newest.global_batch} samples on {newest.world_size} ranks"
            )
        self._plans.append(plan)
