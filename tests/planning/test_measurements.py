"""Measurements of a rank: noise and disturbed steps are not changes of speed; uncertainty of curves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.measurements import KEPT, KEPT_LOCAL_BATCHES, RankMeasurements, fit


def seconds(local_batch: int) -> float:
    return 0.1 + 0.01 * local_batch


def measured(steps: dict[int, int], noise: float = 0.0, seed: int = 0) -> RankMeasurements:
    """Measurements with the given number of steps at each local batch, in that order."""
    rank, rng = RankMeasurements(), np.random.default_rng(seed)
    for local_batch, number in steps.items():
        for _ in range(number):
            rank.observe(local_batch, seconds(local_batch) * rng.lognormal(0, noise))
    return rank


@given(st.integers(0, 50), st.sampled_from([(1.3, 8), (2.0, 4), (0.5, 4), (0.7, 8)]))
def test_a_change_is_noticed_and_scales_what_is_older(seed: int, change: tuple[float, int]) -> None:
    """A large one soon, a smaller one later: it may be a temporary episode."""
    factor, steps = change
    rank = measured({32: 12, 16: 12}, 0.02, seed)
    rng = np.random.default_rng(1000 + seed)
    noticed = [rank.observe(16, factor * seconds(16) * rng.lognormal(0, 0.02)) for _ in range(steps)]
    assert noticed == [False] * (steps - 1) + [True]
    for local_batch in (16, 32):
        assert rank.model().seconds(local_batch) == pytest.approx(factor * seconds(local_batch), rel=0.08)


@given(st.integers(0, 50), st.sampled_from([20, 60, 200]))
def test_a_slow_change_is_followed_but_is_no_drift(seed: int, stayed: int) -> None:
    """8% in all: too little to act at once; other local batches, measured before, follow, however long ago that was."""
    rank = measured({32: 20, 16: stayed}, 0.01, seed)
    rng = np.random.default_rng(seed)
    noticed = [rank.observe(16, 1.08 * seconds(16) * rng.lognormal(0, 0.01)) for _ in range(36)]
    assert not any(noticed)
    assert rank.model().seconds(32) == pytest.approx(1.08 * seconds(32), rel=0.045), "but for half of it, at most"


def test_a_curve_that_is_no_shorter_for_fewer_samples_is_no_change() -> None:
    """A GPU may always take longer for 29 samples than for 32; measurements at 32 must not change."""
    rank = measured({32: 10})
    assert not any(rank.observe(29, 1.25 * seconds(32)) for _ in range(20))
    assert rank.seconds[32] == [seconds(32)] * 10


@given(st.integers(0, 50), st.floats(1.5, 20))
def test_one_disturbed_step_is_no_change(seed: int, factor: float) -> None:
    rank = measured({32: 12, 16: 12}, 0.03, seed)
    assert not rank.observe(16, factor * seconds(16))
    assert not rank.observe(16, seconds(16))
    assert rank.model().seconds(16) == pytest.approx(seconds(16), rel=0.05)


@pytest.mark.parametrize("factor", [0.5, 1.6])
def test_few_measurements_that_do_not_fit_their_neighbors_are_left_out(factor: float) -> None:
    """One disturbed step at 15 would keep plans away from there until more is measured."""
    rank = measured({30: 6, 16: 6})
    rank.observe(15, factor * seconds(15))
    assert rank.model().seconds(15) == pytest.approx(seconds(15), rel=0.02)


def test_few_measurements_far_from_all_others_stand() -> None:
    """Curves jump: what is known of 2 and 4 says nothing of 16."""
    rank = RankMeasurements({2: [0.378] * 5, 4: [0.418] * 3, 16: [1.34, 1.4]})
    assert rank.model().seconds(16) == pytest.approx(1.34)


def test_three_measurements_that_do_not_fit_are_a_jump_of_the_curve() -> None:
    rank = measured({30: 6, 14: 6})
    for _ in range(3):
        rank.observe(16, 1.6 * seconds(16))
    assert rank.model().seconds(16) == pytest.approx(min(1.6 * seconds(16), seconds(30)), rel=0.01)


@given(st.floats(0.01, 0.1), st.integers(0, 20))
def test_noise_is_estimated(noise: float, seed: int) -> None:
    assert measured({16: 40, 32: 40}, noise, seed).noise() == pytest.approx(noise, rel=0.6)


def test_uncertainty_falls_with_measurements_and_rises_with_distance() -> None:
    few, many = measured({16: 5, 32: 5}, 0.03), measured({16: 30, 32: 30}, 0.03)
    assert many.uncertainty(16) < few.uncertainty(16)
    assert many.uncertainty(16) < many.uncertainty(20) < many.uncertainty(64) < many.uncertainty(256)
    assert math.isfinite(many.uncertainty(100_000))


def test_a_neighbor_that_was_measured_once_does_not_add_uncertainty() -> None:
    """Else a split that ran only once would keep the plan away from all splits near it."""
    noisy = [1.0, 1.2, 0.8, 1.1, 0.9] * 8
    between = RankMeasurements({58: noisy, 61: [1.3]})
    assert between.uncertainty(60) < 2 * between.uncertainty(58)
    assert between.uncertainty(61) > 3 * between.uncertainty(58)


def test_what_is_kept_is_bounded() -> None:
    rank = RankMeasurements()
    for step in range(1000):
        rank.observe(step % 50 + 1, 1.0)
        rank.observe_exposed_communication(0.01)
    assert len(rank.seconds) <= KEPT_LOCAL_BATCHES
    assert max(map(len, rank.seconds.values())) < KEPT + 6
    assert len(rank.exposed) <= KEPT


def test_exposed_communication_is_the_median() -> None:
    rank = RankMeasurements()
    assert rank.exposed_communication() is None
    for value in (0.02, 0.9, 0.03):
        rank.observe_exposed_communication(value)
    assert rank.exposed_communication() == 0.03


def test_local_batches_too_close_together_give_no_slope() -> None:
    """From 30 and 31 alone any slope may come out of noise; a part of the time is taken to be fixed."""
    model = fit({30: [1.0], 31: [1.2]})
    assert 0 < model.times[0] < 0.5 * model.seconds(31)
    assert model.seconds(30) < model.seconds(31) < 1.1 * model.seconds(30)


def test_the_first_step_at_a_local_batch_counts_little() -> None:
    """It allocates, compiles and tunes: a split that is tried would look worse than it is, and be left for good."""
    rank = measured({30: 6, 14: 6})
    rank.observe(22, 1.3 * seconds(22))
    rank.observe(22, seconds(22))
    assert rank.model().seconds(22) == pytest.approx(seconds(22))


def test_sparse_measurements_can_be_left_out() -> None:
    rank = measured({32: 10, 16: 2, 8: 3})
    rank.observe_exposed_communication(0.02)
    assert set(rank.without_sparse(3, keep=16).seconds) == {32, 16, 8}
    left = rank.without_sparse(4, keep=8)
    assert set(left.seconds) == {32, 8}
    assert left.exposed_communication() == 0.02
    assert set(rank.seconds) == {32, 16, 8}, "a copy"
