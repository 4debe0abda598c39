"""Which samples of an evaluation each rank takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.evaluation_split import EvaluationTimes, pieces_of, samples_of_ranks

SPEEDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)
SIZES = st.lists(st.integers(0, 9), max_size=40)


@given(SIZES, SPEEDS, st.booleans())
def test_every_sample_has_one_place(sizes, seconds, whole):
    samples = samples_of_ranks(sizes, seconds, whole=whole)
    assert sum(samples) == sum(sizes)
    pieces = [pieces_of(sizes, samples, rank) for rank in range(len(seconds))]
    taken = [(piece.batch, i) for own in pieces for piece in own for i in range(piece.first, piece.last)]
    assert taken == [(batch, i) for batch, size in enumerate(sizes) for i in range(size)]
    assert all(piece.first < piece.last for own in pieces for piece in own), "no batch is empty"
    assert [sum(piece.last - piece.first for piece in own) for own in pieces] == list(samples)
    cut = sum(map(len, pieces)) - sum(size > 0 for size in sizes)
    assert 0 <= cut <= (0 if whole else len(seconds) - 1)


@given(st.integers(1, 300), st.integers(1, 9), SPEEDS)
def test_ranks_finish_together(batches, size, seconds):
    """As early as a split by samples allows, but for the tolerance for whole batches."""
    samples = samples_of_ranks([size] * batches, seconds)
    ends = [n * s for n, s in zip(samples, seconds, strict=True)]
    best = batches * size / sum(1 / s for s in seconds)
    assert max(ends) <= 1.02 * (best + max(seconds)) + 1e-9
    one_less = min((n + 1) * s for n, s in zip(samples, seconds, strict=True))
    assert max(ends) <= 1.02 * one_less * max(size, 1) + 1e-9


def test_whole_batches_where_they_do_as_well():
    assert samples_of_ranks([10] * 10, (1.0, 4.0)) == (80, 20)
    assert samples_of_ranks([10] * 9 + [3], (1.0, 4.0)) == (75, 18), "cutting one batch saves a tenth of the time"
    assert samples_of_ranks([10] * 9 + [3], (1.0, 4.0), whole=True) == (80, 13)
    assert samples_of_ranks([64], (1.0, 1.0)) == (32, 32)
    assert samples_of_ranks([2], (1.0, 100.0)) == (2, 0), "a slow device may get nothing"
    assert samples_of_ranks([], (1.0, 1.0)) == (0, 0)


def test_each_stage_has_times_of_its_own():
    times = EvaluationTimes(2)
    assert times.seconds("val", 8, (3, 1)) == pytest.approx((1 / 3, 1))
    times.update([{"val": [(8, 0.9), (8, 0.1), (8, 0.1), (4, 0.05)]}, {"val": [(8, 0.5)] * 3}])
    assert times.seconds("val", 8, (3, 1)) == pytest.approx((0.1, 0.5))
    assert times.seconds("test", 8, (3, 1)) == pytest.approx((1 / 3, 1))


def test_a_rank_that_was_never_measured_follows_its_proportion_beside_those_that_were():
    times = EvaluationTimes(3)
    times.update([{"val": [(8, 0.1)]}, {"val": [(8, 0.3)]}, {}])
    assert times.seconds("val", 8, (3, 1, 2)) == pytest.approx((0.1, 0.3, 0.15))


def test_times_of_part_of_a_batch_say_what_a_whole_one_takes():
    times = EvaluationTimes(2)
    times.update([{"val": [(2, 0.1)] * 3}, {"val": [(8, 0.3)] * 3}])
    first, second = times.seconds("val", 8, (1, 1))
    assert 0.2 < first <= 0.4
    assert second == pytest.approx(0.3)


def test_fixed_shares_do_not_follow_times():
    times = EvaluationTimes(2, adaptive=False)
    times.update([{"val": [(8, 0.1)]}, {"val": [(8, 0.3)]}])
    assert times.seconds("val", 8, (1, 1)) == (1, 1)


def test_a_share_of_nothing_gets_nothing():
    assert samples_of_ranks([4] * 5, EvaluationTimes(2).seconds("val", 4, (1, 0))) == (20, 0)
