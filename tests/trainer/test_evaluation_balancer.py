"""How evaluations are measured, and what may not be exchanged in them; without a Trainer or other ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import RunningStage

from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.planning.shares import Shares
from lightning_hetero.sampling.eval_sampler import Scope
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.evaluation_exchanges import BroadcastCache, batch_hook, exchange_error
from lightning_hetero.trainer.planner_cache import PlannerCache

# ---- hooks ----


def module_in(stage: RunningStage | None, hook: str | None) -> Any:
    trainer = SimpleNamespace(state=SimpleNamespace(stage=stage))
    return SimpleNamespace(_trainer=trainer, _current_fx_name=hook)


EVALUATING = [
    RunningStage.VALIDATING,
    RunningStage.SANITY_CHECKING,
    RunningStage.TESTING,
    RunningStage.PREDICTING,
]
OF_A_BATCH = [
    "validation_step",
    "test_step",
    "predict_step",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_test_batch_end",
    "on_predict_batch_start",
    "batch_to_device",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
]
OF_ALL_RANKS = [
    "setup",
    "on_sanity_check_start",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_predict_epoch_end",
    "on_save_checkpoint",
    "val_dataloader",
    None,
]


@pytest.mark.parametrize("stage", EVALUATING, ids=str)
def test_the_hooks_that_ranks_reach_differently_often(stage: RunningStage) -> None:
    for hook in OF_A_BATCH:
        assert batch_hook(module_in(stage, hook)) == hook
    for hook in OF_ALL_RANKS:
        assert batch_hook(module_in(stage, hook)) is None


@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end", "batch_to_device", "optimizer_step"])
@pytest.mark.parametrize("stage", [RunningStage.TRAINING, None], ids=str)
def test_all_ranks_reach_the_hooks_of_training(stage: RunningStage | None, hook: str) -> None:
    assert batch_hook(module_in(stage, hook)) is None


def test_a_module_that_belongs_to_no_trainer_is_in_no_hook() -> None:
    assert batch_hook(None) is None
    assert batch_hook(SimpleNamespace(_trainer=None, _current_fx_name="validation_step")) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "hook", "end"),
    [
        (RunningStage.VALIDATING, "validation_step", "on_validation_epoch_end"),
        (RunningStage.SANITY_CHECKING, "validation_step", "on_validation_epoch_end"),
        (RunningStage.TESTING, "on_test_batch_end", "on_test_epoch_end"),
        (RunningStage.PREDICTING, "predict_step", "on_predict_epoch_end"),
        (RunningStage.VALIDATING, "transfer_batch_to_device", "on_validation_epoch_end"),
        (RunningStage.TESTING, "transfer_batch_to_device", "on_test_epoch_end"),
    ],
)
def test_the_sentence_says_who_calls_what_where_and_what_to_do(stage: RunningStage, hook: str, end: str) -> None:
    error = exchange_error("all_gather", hook, stage, "rank 3 (cpu)")
    assert isinstance(error, RuntimeError)
    assert str(error).startswith(f"rank 3 (cpu) calls all_gather in {hook}, but ranks evaluate different numbers")
    assert f"such as in {end}, or" in str(error)


# ---- broadcasts ----


def test_only_what_is_recorded_is_remembered() -> None:
    cache = BroadcastCache()
    cache.add("before", "x")
    with cache.recording():
        for own, result in (("mine", "rank 0's"), (Path("a"), Path("b")), (None, None)):
            cache.add(own, result)
        cache.add(["no", "path"], "x")
        cache.add(7, "x")
    cache.add("after", "x")
    assert [own in cache for own in ("before", "mine", Path("a"), None, ["no", "path"], 7, "after")] == [
        *(False, True, True, True),
        *(False, False, False),
    ]
    assert (cache["mine"], cache[Path("a")], cache[None]) == ("rank 0's", Path("b"), None)


def test_the_next_recording_forgets_the_last_one() -> None:
    cache = BroadcastCache()
    with cache.recording():
        cache.add("a", "b")
    with pytest.raises(ArithmeticError), cache.recording():
        raise ArithmeticError
    cache.add("c", "d")
    assert "a" not in cache
    assert "c" not in cache


# ---- times ----


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


def balancer_of(
    clock: Clock | None = None, shares: Any = "auto", planners: PlannerCache | None = None
) -> EvaluationBalancer:
    group = SimpleNamespace(rank=0, world_size=2)
    return EvaluationBalancer(group, clock or Clock(), Shares.parse(shares), planners or PlannerCache())  # type: ignore[arg-type]


def evaluate(
    balancer: EvaluationBalancer, clock: Clock, mode: RunningStage, sizes: list[int], *, number: int = 0
) -> None:
    """A loader whose batches take 2 seconds a sample."""
    balancer.begin(mode, Scope(number), sizes)
    for size in sizes:
        clock.time += 2.0 * size
        balancer.end_batch()


def ratio(seconds: tuple[float, ...]) -> float:
    return seconds[0] / seconds[1]


def test_each_loader_of_each_stage_is_measured_by_itself() -> None:
    clock = Clock()
    balancer = balancer_of(clock)
    evaluate(balancer, clock, RunningStage.VALIDATING, [8, 3])
    evaluate(balancer, clock, RunningStage.VALIDATING, [5], number=1)
    evaluate(balancer, clock, RunningStage.TESTING, [2])
    assert dict(balancer.measured()) == {
        ("val", 0): [(8, 16.0), (3, 6.0)],
        ("val", 1): [(5, 10.0)],
        ("test", 0): [(2, 4.0)],
    }
    assert balancer.measured() == {}, "each measurement is reported once"


def test_the_host_does_not_wait_for_a_device_that_is_behind() -> None:
    """What it has not come to is left out."""
    clock = Clock()
    balancer = balancer_of(clock)
    evaluate(balancer, clock, RunningStage.VALIDATING, [8, 3, 4])
    clock.reached = 22.0
    assert dict(balancer.measured()) == {("val", 0): [(8, 16.0), (3, 6.0)]}


def test_a_loader_that_is_only_looked_at_measures_nothing() -> None:
    """Lightning makes an iterator of some loaders that it then drops; and others go side by side."""
    clock = Clock()
    balancer = balancer_of(clock)
    balancer.begin(RunningStage.VALIDATING, Scope(0), [8])
    clock.time += 100
    evaluate(balancer, clock, RunningStage.VALIDATING, [3])
    balancer.begin(RunningStage.VALIDATING, Scope(1), [8])
    assert dict(balancer.measured()) == {("val", 0): [(3, 6.0)]}


def test_batches_that_took_no_time_and_ends_without_a_begin_measure_nothing() -> None:
    balancer = balancer_of()
    balancer.end_batch()
    balancer.begin(RunningStage.VALIDATING, Scope(), [4, 4])
    balancer.end_batch()
    assert balancer.measured() == {}


def test_before_a_measurement_the_shares_of_training_hold_where_they_adapt() -> None:
    planners = PlannerCache()
    adaptive, fixed, equal = (balancer_of(None, shares, planners) for shares in ("auto", [1, 4], "equal"))
    for balancer, expected in ((adaptive, 1.0), (fixed, 4.0), (equal, 1.0)):
        assert ratio(balancer.seconds(RunningStage.VALIDATING, Scope(), 8)) == pytest.approx(expected)
    planners.get({}, lambda: (SplitPlanner(Shares.parse([3, 1]), 2, 8), None), first=True)  # (6, 2)
    for balancer, expected in ((adaptive, 1 / 3), (fixed, 4.0), (equal, 1.0)):
        assert ratio(balancer.seconds(RunningStage.VALIDATING, Scope(), 8)) == pytest.approx(expected)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 64))
def test_measured_times_of_the_same_stage_and_loader_decide(first: float, second: float, batch: int) -> None:
    """Others don't; nor do they where shares are fixed."""
    adaptive, fixed = balancer_of(), balancer_of(None, [1, 4])
    reports = [{("val", 0): [(batch, seconds)] * 3} for seconds in (first, second)]
    for balancer in (adaptive, fixed):
        balancer.update(reports)  # type: ignore[arg-type]
    assert ratio(adaptive.seconds(RunningStage.VALIDATING, Scope(), batch)) == pytest.approx(first / second)
    assert ratio(adaptive.seconds(RunningStage.VALIDATING, Scope(1), batch)) == pytest.approx(1.0)
    assert ratio(adaptive.seconds(RunningStage.TESTING, Scope(), batch)) == pytest.approx(1.0)
    assert ratio(fixed.seconds(RunningStage.VALIDATING, Scope(), batch)) == pytest.approx(4.0)


def test_a_sanity_check_and_a_validation_are_the_same_stage() -> None:
    """A validation after it is split alike; that a sanity check is too short to be measured is another's concern."""
    balancer = balancer_of()
    balancer.update([{("val", 0): [(8, 1.0)] * 3}, {("val", 0): [(8, 5.0)] * 3}])
    for stage in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING):
        assert ratio(balancer.seconds(stage, Scope(), 8)) == pytest.approx(1 / 5)
