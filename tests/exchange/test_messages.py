"""The messages of a step: where ranks differ, all of them stop and say so."""

import numpy as np
import pytest

from lightning_hetero.exchange.messages import CHANGES, FETCHES, LEFT_EPOCH, TRAINS, StepMessage, StepMessages


def gathered(*messages: StepMessage) -> StepMessages:
    return StepMessages(np.array([message.row() for message in messages]))


def test_ranks_at_the_same_place_go_on() -> None:
    gathered(*[StepMessage(TRAINS, 7, loss_count=count, plan_checksum=5) for count in (0, 3, 2.5)]).check()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (StepMessage(TRAINS, 7, plan_checksum=6), "split global batch 7 differently"),
        (
            StepMessage(TRAINS, 8, plan_checksum=5),
            "rank 0 is in the training step of global batch 7; rank 1 is in the training step of global batch 8",
        ),
        (
            StepMessage(FETCHES, 8, plan_checksum=5),
            "rank 0 is in the training step of global batch 7; rank 1 is in fetching global batch 8",
        ),
        (StepMessage(LEFT_EPOCH, 7, plan_checksum=5), "rank 1 is in the end of the epoch, after global batch 6"),
        (
            StepMessage(CHANGES, 7, plan_checksum=5),
            "rank 1 is in a change of the parameters that train, by training_step",
        ),
    ],
)
def test_ranks_that_go_different_ways_stop(other: StepMessage, said: str) -> None:
    """Another split on one rank would be a wrong gradient, not an error, if it went unnoticed."""
    with pytest.raises(RuntimeError, match=said):
        gathered(StepMessage(TRAINS, 7, plan_checksum=5), other).check()


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_count_that_can_not_be_weighted_is_named(count: float) -> None:
    with pytest.raises(ValueError, match=r"loss count of global batch 7 is .* on rank 1; it has to be finite"):
        gathered(StepMessage(TRAINS, 7), StepMessage(TRAINS, 7, loss_count=count)).check()


def test_each_field_comes_back_under_its_name() -> None:
    """Also the measurements: two swapped fields would give a wrong plan, not an error."""
    first = StepMessage(TRAINS, 7, 2.5, 5, 9, 4, 0.5, 0.25, 1, 2**30, 11, 0, 0, 6, 2**20, 12, 13, 14, 15)
    second = StepMessage(TRAINS, 7, 3.5, 5, 8, -1, stop_requested=True, should_stop=True)
    messages = gathered(first, second)
    messages.check()
    assert messages.step == 7
    assert messages.column("kind").tolist() == [TRAINS, TRAINS]
    assert messages.column("loss_count").tolist() == [2.5, 3.5]
    assert messages.column("content_hash").tolist() == [11, 0]
    assert messages.column("stop_requested").tolist() == [0, 1]
    assert messages.column("should_stop").tolist() == [0, 1]
    assert messages.column("local_batch").tolist() == [6, 0]
    assert messages.column("input_shape").tolist() == [14, 0]
    assert messages.column("trainable").tolist() == [15, 0]
    reports = messages.reports()
    assert (reports.step, reports.last_drawn) == (7, 9)
    assert reports.measured_steps.tolist() == [4, -1]
    assert reports.compute_seconds.tolist() == [0.5, 0]
    assert reports.sync_seconds.tolist() == [0.25, 0]
    assert reports.averaged_after_backward.tolist() == [True, False]
    memory = reports.memory
    arrays = (memory.local_batches, memory.peaks, memory.resting, memory.fits, memory.fails)
    assert [array.tolist() for array in arrays] == [[6, 0], [2**30, 0], [2**20, 0], [12, 0], [13, 0]]
