"""The planner of the current training job, kept with its measurements for the next fit of the same job."""

from collections.abc import Callable
from typing import Any

from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import Planner, SplitPlanner, UserSharded
from lightning_hetero.trainer.profiles import Profile

NO_PLAN = "there is no plan: it is made with the training loader, and stays in the process that trains"


class PlannerCache:
    """Holds the planner of the training data that was set up last."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        """Identify the job of the planner and of its measurements; empty before there is one."""
        self.profile: Profile | None = None
        """What the planner began with, if anything."""
        self._planner: Planner = UserSharded()

    @property
    def current(self) -> Planner:
        """The current planner; `UserSharded` before the training data is set up, and where the user shards it."""
        return self._planner

    def get(
        self, facts: dict[str, Any], make: Callable[[], tuple[SplitPlanner, Profile | None]], *, first: bool
    ) -> SplitPlanner:
        """The planner of a job; a new one is made where the current one belongs to another job.

        Args:
            facts: identify the job.
            make: makes a planner for it, and returns it with the profile that it begins with, if any.
            first: whether it is for the first of several training loaders; the others use its planner in any case.
        """
        if not isinstance(self._planner, SplitPlanner) or (first and self.facts != facts):
            planner, self.profile = make()
            self.facts, self._planner = facts, planner
            return planner
        return self._planner

    def plan_at(self, step: int) -> Plan:
        """The plan in force at a step.

        Raises:
            RuntimeError: the training loader is not set up yet, or the user shards the data.
        """
        if isinstance(self._planner, SplitPlanner):
            return self._planner.schedule.at(step)
        raise RuntimeError(NO_PLAN)

    def newest_split(self) -> tuple[int, ...] | None:
        """The local batches of the newest plan; None where there is none."""
        return self._planner.schedule.newest.local_batches if isinstance(self._planner, SplitPlanner) else None
