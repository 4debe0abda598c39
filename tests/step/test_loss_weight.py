"""Weights of losses: their plain mean is the mean over the global batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.step.loss_count import loss_weight


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=16))
def test_weights_make_a_plain_mean_the_mean_over_counts(counts: list[int]) -> None:
    """(1/W) sum of w_r m_r = sum of c_r m_r / sum of c_r, for any means m_r."""
    means = np.arange(len(counts)) + 1.0
    weights = [loss_weight(counts, rank) for rank in range(len(counts))]
    if not sum(counts):
        assert weights == [0.0] * len(counts)
        return
    assert np.mean(weights * means) == pytest.approx(np.dot(counts, means) / sum(counts))
