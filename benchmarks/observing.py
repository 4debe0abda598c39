"""What is seen of `hetero` in a run, and how its split is changed from outside; for neither there is a public name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from figures import Split

from lightning_hetero import HeteroStrategy
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import PlanUpdate, SplitPlanner
from lightning_hetero.planning.reports import StepReports


class Observer:
    """Writes down what all ranks report to a planner, and what it plans; changes nothing.

    Args:
        planner: of the run.
        next_step: the number of the next global batch.
        log: the run's `plan.jsonl`.
    """

    def __init__(self, planner: SplitPlanner, next_step: Callable[[], int], log: Path) -> None:
        self._planner = planner
        self._next_step = next_step
        self._log = log
        self._notes: list[dict[str, Any]] = []
        self._splits_reported = 0
        update = planner.update

        def observed(reports: StepReports) -> PlanUpdate:
            result = update(reports)
            for step in result.measured:
                self._notes.append({"step": step.step, "compute": list(step.compute_seconds)})
            if result.measured and result.plans:
                new = result.plans[-1]
                self._notes[-1]["then"] = {
                    "split": new.local_batches,
                    "from": new.first_step,
                    "reason": new.reason,
                    "predicted": new.predicted_seconds,
                }
            return result

        planner.update = observed  # type: ignore[method-assign] # a planner has no other way to be observed

    def report(self) -> dict[str, Any]:
        """What was written down since this was last called, and the split of each step since then."""
        notes, self._notes = self._notes, []
        steps = range(self._splits_reported, self._next_step())
        self._splits_reported = self._next_step()
        splits = [self._planner.schedule.at(step).local_batches for step in steps]
        return {"observed": notes, "splits": splits, "paying": self._paying()}

    def _paying(self) -> dict[str, Any] | None:
        """Which ranks do not pay, as the strategy has written it into the run's folder; None before it does."""
        events = [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []
        return next((event for event in events if event["event"] == "paying"), None)


def observer_of(trainer: pl.Trainer) -> Observer | None:
    """The observer of a run that begins to train; None where it is not one of `hetero`."""
    strategy = trainer.strategy
    if not isinstance(strategy, HeteroStrategy):
        return None
    planner = strategy.job.planner_cache.current
    assert isinstance(planner, SplitPlanner)
    log = Path(trainer.default_root_dir) / "hetero" / "plan.jsonl"
    return Observer(planner, strategy.job.batches.next_step, log)


def change_split(strategy: Any, split: Split) -> None:
    """Another fixed split from the next step on; one run for all of them saves starting a new one for each."""
    schedule = strategy.job.planner_cache.current.schedule
    first = max(strategy.run.loaders.last_drawn + 1, schedule.newest.first_step)
    schedule.append(Plan(first, split, reason="shares"))
