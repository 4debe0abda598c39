"""Ranks that train on the same data are detected from their first batches."""

import numpy as np
import pytest
import torch

from lightning_hetero.exchange.duplicate_data import USER_SHARDS, DuplicateDataCheck, content_hash
from lightning_hetero.exchange.messages import TRAINS, StepMessage, StepMessages


def messages(step: int, *hashes: float) -> StepMessages:
    return StepMessages(np.array([StepMessage(TRAINS, step, content_hash=number).row() for number in hashes]))


def test_the_same_data_in_all_of_the_first_steps_ends_the_run() -> None:
    check = DuplicateDataCheck()
    check.check(messages(0, 5, 5), float("inf"))
    check.check(messages(1, 6, 6), float("inf"))
    with pytest.raises(ValueError, match="all ranks") as error:
        check.check(messages(2, 7, 7), float("inf"))
    assert str(error.value) == USER_SHARDS


def test_an_epoch_that_is_shorter_is_enough() -> None:
    check = DuplicateDataCheck()
    check.check(messages(0, 5, 5), 2)
    with pytest.raises(ValueError, match="same patches"):
        check.check(messages(1, 6, 6), 2)


@pytest.mark.parametrize(
    "hashes",
    [
        pytest.param([(5, 5), (6, 7), (8, 8), (0, 0), (0, 0)], id="other data in one step"),
        pytest.param([(0, 0)] * 5, id="data that the strategy splits"),
        pytest.param([(5,)] * 5, id="one rank"),
        pytest.param([(5, 5, 6)] * 5, id="one rank of three has other data"),
    ],
)
def test_other_data_is_no_error(hashes: list[tuple[float, ...]]) -> None:
    check = DuplicateDataCheck()
    for step, row in enumerate(hashes):
        check.check(messages(step, *row), float("inf"))


def test_a_hash_stands_for_numbers_and_indices() -> None:
    """It is sent as a float, which must represent it exactly; 0 means no hash."""
    batch = {"image": torch.arange(6.0).view(2, 3), "name": "a"}
    same = {"image": torch.arange(6.0).view(2, 3), "name": "a"}
    value = content_hash(batch, "abc")
    assert value == content_hash(same, "abc")
    assert 0 < value < 2**53
    assert value == int(value)
    other = {"image": torch.arange(6.0).view(2, 3) + 1, "name": "a"}
    assert len({value, content_hash(batch, "abd"), content_hash(batch), content_hash(other, "abc")}) == 4
    renamed = batch | {"name": "b"}
    assert content_hash(renamed, "abc") != value
    assert content_hash(np.arange(3)) == content_hash(np.arange(3)) != content_hash(np.arange(1, 4))


def test_what_can_not_be_compared_has_no_hash() -> None:
    """Two such batches would look alike."""
    assert content_hash([object(), None]) == 0
