"""Plans and their schedule: which split holds at which step."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.plan import Plan, Schedule


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-1, (1, 1)), "can't start at step -1"),
        ((0, ()), "not a split of a global batch"),
        ((0, (0, 0)), "not a split of a global batch"),
        ((0, (5, -1)), "not a split of a global batch"),
        ((0, (1, 1), (0.1,)), "1 predicted times for 2 ranks"),
    ],
)
def test_numbers_that_are_no_plan(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan(*arguments)


def test_a_plan_is_frozen_and_says_what_it_adds_up_to():
    plan = Plan(3, (6, 0, 2), (0.1, 0.1, 0.2), "balance")
    assert (plan.global_batch, plan.world_size) == (8, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.first_step = 4  # type: ignore[misc] # that is the point


def test_checksums_distinguish_splits_and_nothing_else():
    assert Plan(0, (3, 1)).checksum == Plan(9, (3, 1), (0.1, 0.2), "drift").checksum
    checksums = {Plan(0, (a, b, 30 - a - b)).checksum for a in range(31) for b in range(31 - a)}
    assert len(checksums) == 31 * 32 // 2
    assert all(float(checksum) == checksum for checksum in checksums), "it travels as a float"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10)), max_size=8), st.integers(0, 40))
def test_the_newest_plan_that_has_begun_holds(appended, step):
    schedule = Schedule(Plan(0, (5, 5)))
    known = [schedule.newest]
    for later, local_batch in appended:
        plan = Plan(known[-1].first_step + later, (local_batch, 10 - local_batch))
        schedule.append(plan)
        known.append(plan)
    assert schedule.newest is known[-1]
    assert list(schedule.plans) == known
    assert schedule.at(step) is [plan for plan in known if plan.first_step <= step][-1]


def test_what_has_been_decided_stays():
    """However plans are appended, what `at` said of earlier steps does not change."""
    schedule = Schedule(Plan(0, (5, 5)))
    schedule.append(Plan(4, (6, 4)))
    before = [schedule.at(step) for step in range(4)]
    schedule.append(Plan(4, (7, 3)))
    assert [schedule.at(step) for step in range(4)] == before
    assert schedule.at(4).local_batches == (7, 3)
    with pytest.raises(ValueError, match="a plan for step 3 comes after one for step 4"):
        schedule.append(Plan(3, (5, 5)))


def test_a_schedule_keeps_to_its_job():
    with pytest.raises(ValueError, match="has to hold from step 0, not from step 2"):
        Schedule(Plan(2, (1, 1)))
    schedule = Schedule(Plan(0, (5, 5)))
    for other in ((5, 6), (5, 3, 2)):
        with pytest.raises(ValueError, match="can't follow one for 10 samples on 2 ranks"):
            schedule.append(Plan(1, other))
    with pytest.raises(ValueError, match="there is no step -1"):
        schedule.at(-1)
