"""Laws of step-time models: what was measured comes back, more samples never take less time, broken numbers raise."""

import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.step_time import StepTimeModel

measurements = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(1e-6, 1e4, allow_nan=False)), min_size=1, max_size=40
)


@given(measurements)
def test_more_samples_never_take_less_time_and_none_takes_no_time(measured: list[tuple[int, float]]) -> None:
    """A falling curve would make allocation, which bisects on it, give wrong splits."""
    model = StepTimeModel.fit(*zip(*measured, strict=True))
    times = [model.seconds(b) for b in sorted({*range(1, 200), *(x + d for x, _ in measured for d in (0, 1, 777))})]
    assert times == sorted(times)
    assert times[0] > 0
    assert math.isfinite(times[-1])


@given(measurements, st.randoms(use_true_random=False))
def test_the_order_of_the_measurements_does_not_matter(measured: list[tuple[int, float]], random: object) -> None:
    """All ranks must get the same model from the same numbers."""
    shuffled = list(measured)
    random.shuffle(shuffled)
    model = StepTimeModel.fit(*zip(*measured, strict=True))
    assert model == StepTimeModel.fit(*zip(*shuffled, strict=True))


@given(st.floats(0, 10), st.floats(1e-4, 1), st.sets(st.integers(1, 500), min_size=2, max_size=8))
def test_a_fixed_cost_and_a_cost_per_sample_are_recovered(fixed: float, each: float, at: set[int]) -> None:
    """Wherever it was measured, and far beyond on both sides."""
    model = StepTimeModel.fit(sorted(at), [fixed + each * b for b in sorted(at)])
    for b in (1, 7, 100, 1000, 5000):
        assert model.seconds(b) == pytest.approx(fixed + each * b, rel=1e-6, abs=1e-6 * each * 5000)


def test_a_rising_curve_of_any_shape_is_followed_through_its_points() -> None:
    """The measured, concave curve of a throttled CPU rank: one straight line is off by a third at small batches."""
    curve = {32: 1.138, 16: 0.660, 12: 0.576, 10: 0.517, 8: 0.481, 6: 0.437, 4: 0.355, 2: 0.260}
    model = StepTimeModel.fit(list(curve), list(curve.values()))
    assert {b: model.seconds(b) for b in curve} == pytest.approx(curve)
    assert model.seconds(7) == pytest.approx((0.437 + 0.481) / 2)
    assert model.seconds(1) == pytest.approx(0.260 - (0.355 - 0.260) / 2)


def test_one_disturbed_step_among_three_does_no_harm() -> None:
    """The median is not affected; a mean would be three times too high."""
    assert StepTimeModel.fit([8, 8, 8, 16], [1.0, 30.0, 1.1, 2.0]).seconds(8) == pytest.approx(1.1)


def test_medians_that_fall_are_pooled_and_many_measurements_outweigh_one() -> None:
    """Noise between near local batches becomes a flat piece at the value that most measurements support."""
    model = StepTimeModel.fit([30, 30, 30, 31, 60], [1.0, 1.01, 0.99, 0.5, 2.0])
    assert model.seconds(30) == model.seconds(31) == pytest.approx(median([1.0, 1.01, 0.99, 0.5]))


def test_with_one_local_batch_the_time_is_proportional() -> None:
    """Nothing is known of a fixed cost yet."""
    model = StepTimeModel.fit([8, 8], [2.0, 4.0])
    assert [model.seconds(b) for b in (1, 8, 80)] == pytest.approx([0.375, 3.0, 30.0])


def test_a_flat_device_is_not_taken_to_be_free_beyond_what_was_measured() -> None:
    """A GPU that is flat up to 32 gets slower somewhere: at most in proportion is the cautious guess."""
    model = StepTimeModel.fit([4, 8, 32], [0.1, 0.1, 0.1])
    assert model.seconds(1) == model.seconds(20) == pytest.approx(0.1)
    assert model.seconds(64) == pytest.approx(0.2)


def test_noise_between_near_local_batches_does_not_decide_the_slope_beyond_them() -> None:
    """59 and 60 say nothing of a slope; 30 and 60 do."""
    model = StepTimeModel.fit([30, 59, 60], [0.5, 0.95, 1.0])
    assert model.seconds(90) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("local_batches", "seconds", "said"),
    [
        ([], [], "no measurements"),
        ([1, 2], [1.0], "2 local batches and 1 times"),
        ([1, 0], [1.0, 1.0], "at least 1, got 0"),
        ([1.5], [1.0], r"whole number of samples.*1\.5"),
        ([4], [0.0], r"measured 0\.0 seconds for a local batch of 4"),
        ([4], [-1.0], r"measured -1\.0 seconds"),
        ([4], [math.nan], "measured nan seconds"),
        ([4], [math.inf], "measured inf seconds"),
    ],
)
def test_broken_measurements_raise_with_their_numbers(local_batches: list, seconds: list, said: str) -> None:
    """They would otherwise surface as a strange plan, hours later."""
    with pytest.raises(ValueError, match=said):
        StepTimeModel.fit(local_batches, seconds)


def test_no_prediction_for_less_than_one_sample() -> None:
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        StepTimeModel.fit([4], [1.0]).seconds(0)


@pytest.mark.parametrize(
    "fields",
    [
        ((1, 2), (1.0, 2.0), 1.0),
        ((0, 2, 2), (1.0, 2.0, 2.0), 1.0),
        ((0, 2), (2.0, 1.0), 1.0),
        ((0, 2), (1.0, 2.0), -1.0),
        ((0, 2), (0.0, 0.0), 1.0),
        ((0, 2), (0.0, math.nan), 1.0),
        ((0, 2), (1.0,), 1.0),
        ((0,), (0.0,), 0.0),
    ],
)
def test_a_curve_that_cannot_be_a_step_time_raises(fields: tuple) -> None:
    """A model is checked once, when it is made."""
    with pytest.raises(ValueError, match=r"must|cannot"):
        StepTimeModel(*fields)
