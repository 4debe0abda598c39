"""The planner of a training job is kept for its next fit, and made anew for another job."""

import pytest

from lightning_hetero.planning.planner import SplitPlanner, UserSharded
from lightning_hetero.planning.shares import Shares
from lightning_hetero.trainer.planner_cache import NO_PLAN, PlannerCache


def planner_of(global_batch: int = 8) -> tuple[SplitPlanner, None]:
    return SplitPlanner(Shares.parse([3, 1]), 2, global_batch), None


def never() -> tuple[SplitPlanner, None]:
    raise AssertionError("a planner is there")


def test_before_the_training_data_there_is_no_plan() -> None:
    planners = PlannerCache()
    assert isinstance(planners.current, UserSharded)
    assert planners.newest_split() is None
    with pytest.raises(RuntimeError, match=NO_PLAN):
        planners.plan_at(0)


def test_a_job_keeps_its_planner() -> None:
    planners = PlannerCache()
    planner = planners.get({"global batch": 8}, planner_of, first=True)
    assert planners.current is planner
    assert planners.get({"global batch": 8}, never, first=True) is planner
    assert planners.newest_split() == (6, 2)
    assert planners.plan_at(100).local_batches == (6, 2)


def test_another_job_gets_another_planner() -> None:
    planners = PlannerCache()
    first = planners.get({"global batch": 8}, planner_of, first=True)
    other = planners.get({"global batch": 16}, lambda: planner_of(16), first=True)
    assert other is planners.current is not first
    assert planners.newest_split() == (12, 4)
    again = planners.get({"global batch": 8}, planner_of, first=True)
    assert again is not first, "of the jobs only the last one is kept"


def test_loaders_that_are_trained_on_together_share_a_planner() -> None:
    """Whatever their own global batches are; and the first one's job is what the next fit is compared with."""
    planners = PlannerCache()
    planner = planners.get({"global batch": 8}, planner_of, first=True)
    assert planners.get({"global batch": 32}, never, first=False) is planner
    assert planners.get({"global batch": 8}, never, first=True) is planner


def test_a_later_loader_may_be_the_first_that_is_split() -> None:
    """Where the user shards the first one."""
    planners = PlannerCache()
    planner = planners.get({"global batch": 8}, planner_of, first=False)
    assert planners.current is planner


def test_a_planner_that_can_not_be_made_leaves_the_one_before() -> None:
    """Another fit of the first job goes on with what it has measured."""
    planners = PlannerCache()
    planner = planners.get({"global batch": 8}, planner_of, first=True)
    with pytest.raises(ValueError, match="global_batch=1 is smaller"):
        planners.get({"global batch": 1}, lambda: planner_of(1), first=True)
    assert planners.current is planner
    assert planners.get({"global batch": 8}, never, first=True) is planner
