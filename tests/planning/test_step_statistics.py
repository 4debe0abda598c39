"""Steps are joined with the ranks' own work in them, whenever that is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.step_statistics import StepStatistics

A, B = (8, 8), (12, 4)


def run(tally, steps, split, seconds=1.0, own=(0.5, 0.5), now=0.0):
    """Steps of a run, each told of in the next."""
    for step in steps:
        tally.begin(now)
        if step > steps[0]:
            tally.update([step - 1] * len(own), own)
        now += seconds
        tally.end(now, step, split, stepped=True)
    tally.update([steps[-1]] * len(own), own)
    return now


def test_a_step_goes_from_end_to_end():
    """What lies between two batches, such as a progress bar, is part of the step; what follows a pause is not."""
    tally = StepStatistics(2)
    tally.begin(0)
    tally.end(1, 0, A, stepped=True)
    tally.begin(1.5)
    tally.end(3, 1, A, stepped=True)
    tally.pause()
    tally.begin(100)
    tally.end(101, 2, A, stepped=True)
    tally.update([1, 1], [0.5, 1.5])
    assert tally.pace().seconds == 2
    tally.update([2, 2], [0.5, 0.25])
    pace = tally.pace()
    assert (pace.seconds, pace.idle) == (1, 0.625)
    assert tally.pace() is None, "nothing new"


def test_the_first_step_is_left_out():
    tally = StepStatistics(2)
    tally.begin(0)
    tally.end(50, 7, A, stepped=True)
    tally.update([7, 7], [1, 1])
    assert tally.pace() is None
    run(tally, range(8, 12), A, now=50)
    assert tally.pace().seconds == tally.early_seconds() == tally.latest_seconds() == 1


def test_accumulation_gives_means_of_micro_batches():
    tally = StepStatistics(1)
    now = 0.0
    for step, took in enumerate([9, 9, 1, 2, 3, 4]):
        tally.begin(now)
        now += took
        tally.end(now, step, (4,), stepped=step % 2 == 1)
    for step in range(6):
        tally.update([step], [0.75])
    pace = tally.pace()
    assert pace.seconds == (1.5 + 3.5) / 2
    assert pace.idle == pytest.approx(1 - 0.75 / 2.5)


def test_steps_that_are_not_told_of_do_not_count():
    """A short last batch is measured by nobody."""
    tally = StepStatistics(2)
    now = run(tally, range(4), A)
    tally.begin(now)
    tally.end(now + 30, 4, A, stepped=True)
    tally.update([-1, -1], [0, 0])
    assert tally.pace().seconds == 1


def test_only_steps_at_the_first_split_are_early_and_at_the_last_late():
    tally = StepStatistics(2)
    now = run(tally, range(4), A, seconds=4)
    now = run(tally, range(4, 9), B, seconds=2, now=now)
    assert (tally.first_split, tally.split, tally.settled) == (A, B, 5)
    assert (tally.early_seconds(), tally.latest_seconds()) == (4, 2)
    run(tally, range(9, 17), A, seconds=8, now=now)
    assert (tally.split, tally.settled) == (A, 8)
    assert (tally.early_seconds(), tally.latest_seconds()) == (4, 8), "a return to the first split is not early"


@given(st.data(), st.integers(1, 4), st.integers(2, 60))
def test_order_of_telling_does_not_matter(data, world_size, steps):
    """Ranks tell some steps late, each by its own delay: the averages are those of the steps that all told of."""
    delays = data.draw(st.lists(st.integers(1, 5), min_size=world_size, max_size=world_size))
    took = data.draw(st.lists(st.floats(1, 2), min_size=steps, max_size=steps))
    own = data.draw(st.lists(st.floats(0.1, 1), min_size=steps, max_size=steps))
    tally, now = StepStatistics(world_size), 0.0
    for step in range(steps):
        tally.begin(now)
        told = [step - delay for delay in delays]
        tally.update(told, [own[t] if t >= 0 else 0.0 for t in told])
        now += took[step]
        tally.end(now, step, (1,) * world_size, stepped=True)
    known = range(1, steps - max(delays))
    pace = tally.pace()
    if not known:
        assert pace is None
        return
    assert pace.seconds == pytest.approx(sum(took[k] for k in known) / len(known))
    assert pace.idle == pytest.approx(1 - sum(own[k] for k in known) / sum(took[k] for k in known), abs=1e-9)
    assert 0 <= pace.idle < 1
    assert tally.settled == len(known)


def test_memory_stays_bounded():
    tally = StepStatistics(2)
    for step in range(1000):
        tally.end(step, step, A, stepped=True)
        tally.update([step, -1], [0.5, 0])
    assert len(tally._walls) <= StepStatistics.PATIENCE + 1
    assert len(tally._told) <= StepStatistics.PATIENCE + 1
    run(tally, range(1000, 1100), B)
    assert len(tally._latest) == StepStatistics.LATEST


def test_own_work_beyond_the_step_is_noise():
    tally = StepStatistics(1)
    run(tally, range(3), (4,), own=(1.01,))
    assert tally.pace().idle == 0
