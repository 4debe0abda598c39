"""The planner of the training job at hand; what it has measured is kept for the next fit of the same job."""

from collections.abc import Callable
from typing import Any

from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import Planner, SplitPlanner, UserSharded

NO_PLAN = "there is no plan: it is made with the training loader, and stays in the process that trains"


class Planners:
    """Holds the planner of the training data that was set up last."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        """What the planner holds for, and what is measured for it; empty before there is one."""
        self._planner: Planner = UserSharded()

    @property
    def current(self) -> Planner:
        """The planner in force; one that never plans before the training data is set up, and where the user shards."""
        return self._planner

    def get(self, facts: dict[str, Any], make: Callable[[], SplitPlanner], *, first: bool) -> SplitPlanner:
        """The planner of a job, made where the current one is of another job.

        Args:
            facts: what a planner holds for.
            make: a planner for it.
            first: it is for the first of several training loaders; later ones use its planner, whatever their facts.
        """
        if not isinstance(self._planner, SplitPlanner) or (first and self.facts != facts):
            self.facts, planner = facts, make()
            self._planner = planner
            return planner
        return self._planner

    def plan_at(self, step: int) -> Plan:
        """The plan in force at a step.

        Raises:
            RuntimeError: there is none before the training loader is set up, nor where the user shards.
        """
        if isinstance(self._planner, SplitPlanner):
            return self._planner.schedule.at(step)
        raise RuntimeError(NO_PLAN)

    def newest_split(self) -> tuple[int, ...] | None:
        """The local batches of the newest plan; None where there is none."""
        return self._planner.schedule.newest.local_batches if isinstance(self._planner, SplitPlanner) else None
