"""Steps are joined with what ranks measured in them, whenever that becomes known."""

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.reports import MeasuredStep
from lightning_hetero.planning.step_statistics import KEPT_STEPS, StepStatistics

A, B = (8, 8), (12, 4)


def measured(step, split=A, compute=(0.5, 0.5)):
    return MeasuredStep(step, split, compute, (0.0,) * len(split), averaged_after_backward=False)


def run(statistics, steps, split, seconds=1.0, compute=(0.5, 0.5), now=0.0):
    """Steps of a run, each measured before the next one ends."""
    for step in steps:
        statistics.begin(now)
        if step > steps[0]:
            statistics.update([measured(step - 1, split, compute)])
        now += seconds
        statistics.end(now, step, stepped=True)
    statistics.update([measured(steps[-1], split, compute)])
    return now


def test_a_step_goes_from_end_to_end():
    """What lies between two batches, such as a progress bar, is part of the step; what follows a pause is not."""
    statistics = StepStatistics()
    statistics.begin(0)
    statistics.end(1, 0, stepped=True)
    statistics.begin(1.5)
    statistics.end(3, 1, stepped=True)
    statistics.pause()
    statistics.begin(100)
    statistics.end(101, 2, stepped=True)
    statistics.update([measured(1, compute=(0.5, 1.5))])
    assert statistics.averages() == (2, 0.5)
    statistics.update([measured(2, compute=(0.5, 0.25))])
    assert statistics.averages() == (1, 0.625)
    assert statistics.averages() is None, "nothing new"


def test_the_first_step_is_left_out():
    statistics = StepStatistics()
    statistics.begin(0)
    statistics.end(50, 7, stepped=True)
    statistics.update([measured(7)])
    assert statistics.averages() is None
    assert statistics.splits == ()
    run(statistics, range(8, 12), A, now=50)
    assert statistics.averages() == (1, 0.5)


def test_accumulation_gives_means_of_micro_batches():
    statistics = StepStatistics()
    now = 0.0
    for step, seconds in enumerate([9, 9, 1, 2, 3, 4]):
        statistics.begin(now)
        now += seconds
        statistics.end(now, step, stepped=step % 2 == 1)
    statistics.update([measured(step, (4,), (0.75,)) for step in range(6)])
    assert statistics.averages() == ((1.5 + 3.5) / 2, pytest.approx(1 - 0.75 / 2.5))


def test_steps_that_are_not_measured_do_not_count():
    """No rank measures a short last batch."""
    statistics = StepStatistics()
    now = run(statistics, range(4), A)
    statistics.begin(now)
    statistics.end(now + 30, 4, stepped=True)
    statistics.update([])
    assert statistics.averages() == (1, 0.5)


def test_the_first_split_is_kept_beside_the_last_one():
    statistics = StepStatistics()
    now = run(statistics, range(4), A, seconds=4)
    assert [split.local_batches for split in statistics.splits] == [A]
    now = run(statistics, range(4, 9), B, seconds=2, now=now)
    assert [(split.local_batches, list(split.seconds)) for split in statistics.splits] == [(A, [4] * 3), (B, [2] * 5)]
    run(statistics, range(9, 17), A, seconds=8, now=now)
    first, last = statistics.splits
    assert (list(first.seconds), list(last.seconds)) == ([4] * 3, [8] * 8), (
        "a return to the first split is the last one"
    )


@given(st.data(), st.integers(1, 4), st.integers(2, 60))
def test_averages_are_those_of_the_measured_steps(data, delay, steps):
    """However late they become known."""
    seconds = data.draw(st.lists(st.floats(1, 2), min_size=steps, max_size=steps))
    compute = data.draw(st.lists(st.floats(0.1, 1), min_size=steps, max_size=steps))
    statistics, now = StepStatistics(), 0.0
    for step in range(steps):
        statistics.begin(now)
        if step >= delay:
            statistics.update([measured(step - delay, compute=(compute[step - delay],) * 2)])
        now += seconds[step]
        statistics.end(now, step, stepped=True)
    known = range(1, steps - delay)
    averages = statistics.averages()
    if not known:
        assert averages is None
        return
    mean, idle = averages
    assert mean == pytest.approx(sum(seconds[k] for k in known) / len(known))
    assert idle == pytest.approx(1 - sum(compute[k] for k in known) / sum(seconds[k] for k in known), abs=1e-9)
    assert 0 <= idle < 1
    (split,) = statistics.splits
    assert median(split.seconds) == pytest.approx(median([seconds[k] for k in known][-KEPT_STEPS:]))


def test_what_is_measured_too_late_is_given_up():
    """Keeps memory bounded if nothing is measured, as with only short batches."""
    statistics = StepStatistics()
    for step in range(100):
        statistics.end(step, step, stepped=True)
    statistics.update([measured(step) for step in range(100 - KEPT_STEPS)])
    assert statistics.averages() is None
    statistics.update([measured(step) for step in range(100)])
    assert len(statistics.splits[0].seconds) == KEPT_STEPS


def test_compute_time_beyond_the_step_is_noise():
    statistics = StepStatistics()
    run(statistics, range(3), (4,), compute=(1.01,))
    assert statistics.averages() == (1, 0)
