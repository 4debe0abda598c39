"""What ranks tell each other before each backward pass: where they differ, all of them stop and say so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.exchange.messages import FETCHES, LEFT_EPOCH, TRAINS, StepMessage, check, weight


def rows(*messages: StepMessage) -> np.ndarray:
    return np.array([message.row() for message in messages])


def test_ranks_at_the_same_place_go_on() -> None:
    check(rows(*[StepMessage(TRAINS, 7, count=count, checksum=5) for count in (0, 3, 2.5)]))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (StepMessage(TRAINS, 7, checksum=6), "split global batch 7 differently"),
        (StepMessage(TRAINS, 8, checksum=5), "rank 0 trains on global batch 7; rank 1 trains on global batch 8"),
        (StepMessage(FETCHES, 8, checksum=5), "rank 0 trains on global batch 7; rank 1 fetches global batch 8"),
        (StepMessage(LEFT_EPOCH, 7, checksum=5), "rank 1 left the epoch after global batch 6"),
    ],
)
def test_ranks_that_go_different_ways_stop(other: StepMessage, said: str) -> None:
    """Another split on one rank would be a wrong gradient, not an error, if it went unnoticed."""
    with pytest.raises(RuntimeError, match=said):
        check(rows(StepMessage(TRAINS, 7, checksum=5), other))


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_count_that_can_not_be_weighted_is_named(count: float) -> None:
    with pytest.raises(ValueError, match=r"loss count of global batch 7 is .* on rank 1; it has to be finite"):
        check(rows(StepMessage(TRAINS, 7), StepMessage(TRAINS, 7, count=count)))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=16))
def test_weights_make_a_plain_mean_the_mean_over_counts(counts: list[int]) -> None:
    """(1/W) sum of w_r m_r = sum of c_r m_r / sum of c_r, for any means m_r."""
    means = np.arange(len(counts)) + 1.0
    weights = [weight(counts, rank) for rank in range(len(counts))]
    if not sum(counts):
        assert weights == [0.0] * len(counts)
        return
    assert np.mean(weights * means) == pytest.approx(np.dot(counts, means) / sum(counts))
