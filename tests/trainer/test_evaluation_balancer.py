"""How evaluations are measured and split; without a Trainer or other ranks."""

import warnings
from typing import Any

import pytest
from lightning.pytorch.trainer.states import RunningStage

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.planning.shares import Shares
from lightning_hetero.sampling.eval_sampler import Scope
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.planner_cache import PlannerCache


class Clock:
    """A clock of a device that has come to `reached`, which the test sets as it sets the time of the host."""

    def __init__(self) -> None:
        self.time, self.reached = 0.0, float("inf")

    def now(self) -> float:
        return self.time

    def has_passed(self, point: float) -> bool:
        return point <= self.reached

    def seconds(self, start: float, end: float) -> float:
        assert self.has_passed(end)
        return end - start


VALIDATING, TESTING = RunningStage.VALIDATING, RunningStage.TESTING


def balancer_of(
    clock: Clock | None = None, shares: Any = "auto", planners: PlannerCache | None = None
) -> EvaluationBalancer:
    timer = ComputeTimer(clock or Clock())  # type: ignore[arg-type]
    return EvaluationBalancer(2, timer, Shares.parse(shares), planners or PlannerCache())


def evaluate(balancer: EvaluationBalancer, clock: Clock, stage: RunningStage, sizes: list[int], **scope: Any) -> None:
    """A loader whose batches take 2 seconds a sample."""
    balancer.begin(stage, Scope(**scope), sizes)
    for size in sizes:
        assert balancer.begin_batch() == size
        clock.time += 2.0 * size
        balancer.end_batch()


def split(balancer: EvaluationBalancer, stage: RunningStage, size: int, number: int = 0) -> tuple[int, ...]:
    (found,) = balancer.splits(stage, Scope(number), [size])
    return found


def test_each_loader_of_each_stage_is_measured_by_itself() -> None:
    clock = Clock()
    balancer = balancer_of(clock)
    evaluate(balancer, clock, VALIDATING, [8, 3])
    evaluate(balancer, clock, VALIDATING, [5], number=1)
    evaluate(balancer, clock, TESTING, [2])
    assert dict(balancer.measured()) == {
        ("val", 0): [(8, 16.0), (3, 6.0)],
        ("val", 1): [(5, 10.0)],
        ("test", 0): [(2, 4.0)],
    }
    assert balancer.measured() == {}, "each measurement is reported once"


def test_waiting_for_others_is_no_time_of_a_batch() -> None:
    """What the module exchanges in a batch ends when the slowest rank has joined."""
    clock, timer = Clock(), None
    timer = ComputeTimer(clock)  # type: ignore[arg-type]
    balancer = EvaluationBalancer(2, timer, Shares.parse("auto"), PlannerCache())
    balancer.begin(VALIDATING, Scope(), [4])
    clock.time += 3.0
    with timer.waiting():
        clock.time += 100.0
    balancer.end_batch()
    assert dict(balancer.measured()) == {("val", 0): [(4, 3.0)]}


def test_the_host_does_not_wait_for_a_device_that_is_behind() -> None:
    """What it has not come to is left out."""
    clock = Clock()
    balancer = balancer_of(clock)
    evaluate(balancer, clock, VALIDATING, [8, 3, 4])
    clock.reached = 22.0
    assert dict(balancer.measured()) == {("val", 0): [(8, 16.0), (3, 6.0)]}


def test_a_loader_that_is_only_looked_at_measures_nothing() -> None:
    """Lightning makes an iterator of some loaders that it then drops."""
    clock = Clock()
    balancer = balancer_of(clock)
    balancer.begin(VALIDATING, Scope(0), [8])
    clock.time += 100
    evaluate(balancer, clock, VALIDATING, [3])
    balancer.begin(VALIDATING, Scope(1), [8])
    assert dict(balancer.measured()) == {("val", 0): [(3, 6.0)]}


def test_batches_that_took_no_time_and_ends_without_a_begin_measure_nothing() -> None:
    balancer = balancer_of()
    balancer.end_batch()
    assert balancer.begin_batch() is None, "the user shards the data"
    balancer.begin(VALIDATING, Scope(), [4, 4])
    balancer.end_batch()
    assert balancer.measured() == {}


@pytest.mark.filterwarnings("ignore:a rank has no samples of its own")
def test_loaders_side_by_side_are_one() -> None:
    """A step has as many samples as the loader with the most; a loader that starts again begins nothing."""
    clock = Clock()
    balancer = balancer_of(clock)
    balancer.begin(VALIDATING, Scope(side_by_side=True), [4, 4, 0])
    balancer.begin(VALIDATING, Scope(side_by_side=True), [2, 6])
    for size in (4, 6, 0):
        assert balancer.begin_batch() == size
        clock.time += 1.0
        balancer.end_batch()
        balancer.begin(VALIDATING, Scope(side_by_side=True), [2, 6])
    assert balancer.begin_batch() is None
    assert balancer.borrowed_batches() == [{2}]
    assert dict(balancer.measured()) == {("val", 0): [(4, 1.0), (6, 1.0)]}


@pytest.mark.filterwarnings("ignore:a rank has no samples of its own")
def test_batches_of_borrowed_samples_are_known() -> None:
    clock = Clock()
    balancer = balancer_of(clock)
    evaluate(balancer, clock, RunningStage.PREDICTING, [3, 0])
    evaluate(balancer, clock, RunningStage.PREDICTING, [0], number=1)
    assert balancer.borrowed_batches() == [{1}, {0}]
    balancer.measured()
    assert balancer.borrowed_batches() == []


def test_a_step_with_fewer_samples_than_ranks_is_told_once() -> None:
    balancer = balancer_of()
    with pytest.warns(
        UserWarning, match=r"a step of the val loader has fewer samples \(1\) than there are ranks \(2\)"
    ):
        assert split(balancer, VALIDATING, 1) == (1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split(balancer, VALIDATING, 1) == (1, 0)
    assert balancer.splits(VALIDATING, Scope(), []) == []


def test_before_a_measurement_the_shares_of_training_hold_where_they_adapt() -> None:
    planners = PlannerCache()
    adaptive, fixed, equal = (balancer_of(None, shares, planners) for shares in ("auto", [1, 3], "equal"))
    for balancer, expected in ((adaptive, (4, 4)), (fixed, (2, 6)), (equal, (4, 4))):
        assert split(balancer, VALIDATING, 8) == expected
    planners.get({}, lambda: (SplitPlanner(Shares.parse([3, 1]), 2, 8), None), first=True)  # (6, 2)
    for balancer, expected in ((adaptive, (6, 2)), (fixed, (2, 6)), (equal, (4, 4))):
        assert split(balancer, VALIDATING, 8) == expected


def proportional(seconds: float) -> dict[Any, Any]:
    """What a rank reports that takes so many seconds for a sample."""
    return {("val", 0): 3 * [(batch, seconds * batch) for batch in (1, 4, 16)]}


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 3.0), (6, 2)), ((3.0, 1.0), (2, 6)), ((1.0, 9.0), (7, 1))])
def test_measured_times_of_the_same_stage_and_loader_decide(
    seconds: tuple[float, float], expected: tuple[int, int]
) -> None:
    """Others don't; nor do they where shares are fixed. A sanity check is split like the validation that follows."""
    adaptive, fixed = balancer_of(), balancer_of(None, [1, 3])
    for balancer in (adaptive, fixed):
        balancer.update([proportional(of_rank) for of_rank in seconds])
    for stage in (VALIDATING, RunningStage.SANITY_CHECKING):
        assert split(adaptive, stage, 8) == expected
    assert split(adaptive, VALIDATING, 8, number=1) == (4, 4)
    assert split(adaptive, TESTING, 8) == (4, 4)
    assert split(fixed, VALIDATING, 8) == (2, 6)
