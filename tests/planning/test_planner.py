"""From shares and reports to plans: fixed and adaptive ones, memory, profiles; the same on every rank."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.memory import MemoryLimits
from lightning_hetero.planning.planner import Planner, SplitPlanner, UserSharded, check_global_batch
from tests.planning.stepping import memory_reports, planner, step_reports, take


@pytest.mark.parametrize(
    "shares", ["auto", "equal", [3, 1], (3, 1), np.array([4, 1]), [0, 1], [0.25, 0.75], [1e300, 1e-300]]
)
def test_every_rank_gets_something_from_the_first_plan_on(shares):
    """Also with a share of 0."""
    plan = planner(shares, 2, 16).schedule.newest
    assert plan.first_step == 0
    assert sum(plan.local_batches) == 16
    assert min(plan.local_batches) >= 1


def test_shares_are_proportions():
    assert planner([3, 1], 2, 16).schedule.newest.local_batches == (12, 4)
    assert planner([1, 3], 2, 16).schedule.newest.local_batches == (4, 12)
    assert planner("equal", 3, 16).schedule.newest.local_batches == (6, 5, 5)
    assert planner([7, 1, 8], 3, 64).schedule.newest.local_batches == (28, 4, 32)
    assert planner([3, 1], 2, 16, granularity=8).schedule.newest.local_batches == (8, 8)


@pytest.mark.parametrize(
    ("world_size", "global_batch", "options", "sentence"),
    [
        (4, 3, {}, "global_batch=3 is smaller than the number of ranks, 4"),
        (2, 9, {"granularity": 4}, "not a multiple of granularity 4"),
        (3, 8, {"granularity": 4}, "4 more than the global batch 8"),
    ],
)
@pytest.mark.parametrize("shares", ["auto", "equal"])
def test_a_global_batch_that_can_not_be_split(shares, world_size, global_batch, options, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared below
        planner(shares, world_size, global_batch, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_as_many_samples_as_ranks_are_enough():
    check_global_batch(4, 4)
    with pytest.raises(ValueError, match="smaller than the number of ranks"):
        check_global_batch(3, 4)


def test_numbers_for_other_ranks_are_refused():
    with pytest.raises(ValueError, match="2 numbers, but there are 3 ranks"):
        planner([1, 2], 3, 16)


@given(
    st.data(),
    st.integers(1, 16),
    st.integers(0, 60),
    st.integers(1, 2),
    st.sampled_from(["auto", "equal", "numbers"]),
)
def test_first_plans_give_every_rank_at_least_the_minimum(data, world_size, more, minimum, kind):
    number = st.floats(0, 100, allow_nan=False)
    shares = (
        data.draw(st.lists(number, min_size=world_size, max_size=world_size).filter(any)) if kind == "numbers" else kind
    )
    made = planner(shares, world_size, world_size + more, minimum=minimum)
    plan = made.schedule.newest
    assert plan.global_batch == world_size + more
    assert plan.world_size == world_size
    assert made.minimum == (2 if minimum == 2 and more >= world_size else 1)
    assert min(plan.local_batches) >= made.minimum


@pytest.mark.parametrize("shares", ["equal", [3, 1]])
def test_fixed_shares_stay_and_steps_are_reported_all_the_same(shares):
    fixed = planner(shares, 2, 16)
    for step in range(20):
        update = take(fixed, step, [0.1, 1.0], drawn=step + 3)
        assert update.plans == ()
        assert [measured.step for measured in update.measured] == [step]
    assert len(fixed.schedule.plans) == 1
    assert fixed.models() is None
    assert fixed.state_dict() is None
    assert fixed.exposed_communication() == (0, 0)


def slow_second_rank(split):
    """Rank 1 needs four times as long for a sample."""
    return [0.01 + 0.01 * split[0], 0.01 + 0.04 * split[1]]


@pytest.mark.parametrize("ahead", [0, 3, 40])
def test_adaptive_shares_give_the_slow_rank_less_from_a_step_that_is_not_drawn_yet(ahead):
    """Two planners with the same reports decide the same."""
    planners = [planner("auto", 2, 50) for _ in range(2)]
    assert planners[0].schedule.newest.reason == "equal"
    for step in range(200):
        seconds = slow_second_rank(planners[0].schedule.at(step).local_batches)
        updates = [take(each, step, seconds, drawn=step + ahead) for each in planners]
        assert updates[0] == updates[1]
        for plan in updates[0].plans:
            assert plan.first_step > step + ahead
            assert planners[0].schedule.newest is plan
    assert planners[0].schedule.newest.local_batches == (40, 10)


def test_plans_start_in_order_also_after_a_pass_that_was_left_early():
    """Its loaders had drawn further ahead than those of the next pass."""
    adaptive, starts = planner("auto", 2, 50), []
    for step in range(60):
        seconds = slow_second_rank(adaptive.schedule.at(step).local_batches)
        update = take(adaptive, step, seconds, drawn=step + (30 if step < 5 else 0))
        starts += [plan.first_step for plan in update.plans]
    assert starts == sorted(starts)
    assert len(starts) >= 2


def test_one_rank_has_nothing_to_balance():
    alone = planner("auto", 1, 7)
    assert alone.schedule.newest.local_batches == (7,)
    assert not any(take(alone, step, [0.1]).plans for step in range(10))
    assert not alone.is_exploring


def test_it_makes_no_difference_how_late_a_rank_reports() -> None:
    """A rank whose device is some steps behind its host reports later; a step counts once all ranks have."""
    decided: list[list[tuple[int, ...]]] = [[], []]
    for plans, late in zip(decided, (0, 2), strict=True):
        adaptive = planner("auto", 2, 64)
        for step in range(40):
            measured = [step, max(step - late, -1)]
            update = adaptive.update(step_reports(step, measured, [0.1, 1.0 if measured[1] >= 0 else 0.0]))
            plans += [plan.local_batches for plan in update.plans]
    assert decided[0]
    assert decided[0][0] == decided[1][0]


def test_nothing_is_decided_while_a_rank_has_no_measurement() -> None:
    adaptive = planner("auto", 2, 64)
    for step in range(200):
        assert adaptive.update(step_reports(step, [step, -1], [0.1, 0.0])).plans == ()


def test_the_first_plan_follows_a_speed_test_where_nothing_else_is_known() -> None:
    plan = planner("auto", 2, 64, speeds=[4.0, 1.0]).schedule.newest
    assert (plan.first_step, plan.reason) == (0, "probe")
    assert 32 < plan.local_batches[0] <= 51, "not beyond the proportional split"
    assert planner("auto", 2, 64, speeds=[1.1, 1.0]).schedule.newest.reason == "equal"
    for shares in ("equal", [1, 1]):
        assert planner(shares, 2, 64, speeds=[4.0, 1.0]).schedule.newest.local_batches == (32, 32)


# ---- exploration ----


def is_exploring_after(adaptive: SplitPlanner, step: int, drawn: int, measured: int) -> bool:
    """Whether it is exploring, after ranks of which the second is slow have reported a step."""
    split = adaptive.schedule.at(max(measured, 0)).local_batches
    adaptive.update(step_reports(step, [measured] * 2, [0.01 * split[0], 0.04 * split[1]], drawn=drawn))
    return adaptive.is_exploring


def test_it_explores_before_a_batch_is_drawn_while_that_may_change_the_plan() -> None:
    adaptive = planner("auto", 2, 64)
    assert not adaptive.is_exploring, "nothing is measured before the first step"
    assert is_exploring_after(adaptive, 0, 0, -1)
    assert is_exploring_after(adaptive, 1, 0, 0)
    assert adaptive.schedule.newest.first_step == 1, "in force for the very next batch"
    assert not is_exploring_after(adaptive, 1, 2, 1), "loaders have drawn the next batch already"
    for step in range(2, 40):
        is_exploring_after(adaptive, step, step, step - 1)
    assert not adaptive.is_exploring, "the plan has settled"
    assert not is_exploring_after(planner("equal", 2, 64), 0, 0, -1)


def test_it_gives_up_where_no_step_can_be_measured_until_one_is() -> None:
    """Every batch of an epoch may be a short one."""
    adaptive = planner("auto", 2, 64)
    explored = [is_exploring_after(adaptive, step, step, -1) for step in range(20)]
    assert explored[0]
    assert explored == sorted(explored, reverse=True)
    assert not explored[-1]
    assert is_exploring_after(adaptive, 20, 20, 19)


# ---- memory ----


@pytest.mark.parametrize("shares", ["auto", "equal", [1, 1, 1]])
def test_a_plan_beyond_the_caps_is_replaced_at_once_and_the_surplus_goes_to_the_others(shares) -> None:
    limited = planner(shares, 3, 60, memory=MemoryLimits((math.inf,) * 3, ("a", "b", "c")))
    nothing = step_reports(3, [-1] * 3, [0.0] * 3)
    assert limited.update(nothing).plans == ()
    ran_out = step_reports(4, [-1] * 3, [0.0] * 3, memory=memory_reports((20, 1.0), (0, 0.0, 0.0, 10), (0,)))
    update = limited.update(ran_out)
    (plan,) = update.plans
    assert (plan.first_step, plan.reason, plan.local_batches) == (5, "memory", (25, 10, 25))
    assert limited.schedule.newest is plan
    assert "rank 1 (b) ran out of memory" in update.warnings[0]
    again = limited.update(ran_out)
    assert (again.plans, again.warnings) == ((), ())


def test_adaptive_plans_keep_to_the_caps() -> None:
    """Rank 0 is four times as fast, and would get 40 of 50; its memory holds 30."""
    limited = planner("auto", 2, 50, memory=MemoryLimits((30.0, math.inf), ("a", "b")))
    for step in range(60):
        split = limited.schedule.at(step).local_batches
        memory = memory_reports((split[0], 1.0 * split[0]), (split[1],))
        take(limited, step, slow_second_rank(split), memory=memory)
    plans = [plan.local_batches for plan in limited.schedule.plans]
    assert plans[-1] == (30, 20)
    assert max(plan[0] for plan in plans) == 30


def test_another_fit_forgets_what_was_seen_of_memory() -> None:
    """Its samples may be larger."""
    limited = planner("equal", 2, 64, memory=MemoryLimits((1e6, 1e6), ("a", "b")))
    assert not limited.fits_in_memory((32, 32)), "nothing is known yet"
    take(limited, 0, [1.0, 1.0], memory=memory_reports((32, 100.0), (32, 100.0)))
    assert limited.fits_in_memory((32, 32))
    limited.forget_memory()
    assert not limited.fits_in_memory((32, 32))
    assert not planner("equal", 2, 64).fits_in_memory((32, 32)), "without limits nothing is known either"


# ---- profiles ----


def steps_of(made: SplitPlanner, first: int, number: int, slower: float = 1.0) -> None:
    for step in range(first, first + number):
        split = made.schedule.at(step).local_batches
        take(made, step, [0.1 + 0.01 * split[0], slower * (0.1 + 0.04 * split[1])])


def profile() -> dict:
    """The profile of an earlier run, converted to JSON and back."""
    earlier = planner("auto", 2, 64)
    steps_of(earlier, 0, 60)
    return json.loads(json.dumps(earlier.state_dict()))


def test_a_planner_begins_where_the_earlier_run_ended() -> None:
    """The balanced split is there from step 0; a device that is slower now is noticed all the same."""
    later = planner("auto", 2, 64, profile=profile())
    first = later.schedule.newest
    assert (first.first_step, first.reason) == (0, "profile")
    assert max(first.predicted_seconds) < 0.65, "at 32/32 it is 1.38, and the best is 0.62"
    true = [0.1 + 0.01 * first.local_batches[0], 0.1 + 0.04 * first.local_batches[1]]
    assert first.predicted_seconds == pytest.approx(true, rel=0.01)
    steps_of(later, 0, 12, slower=3)
    assert later.schedule.newest.local_batches[0] > first.local_batches[0]


def test_no_rank_begins_with_more_than_it_has_had() -> None:
    """Nothing is known of its memory there."""
    state = profile() | {"measured": [[[32, [0.42] * 5], [50, [0.6] * 5]], [[32, [1.38] * 5], [14, [0.66] * 5]]]}
    assert planner("auto", 2, 64, profile=state).schedule.newest.local_batches == (50, 14), "52/12 would be faster"


def test_of_a_profile_the_last_measurements_are_kept_and_few_of_them() -> None:
    """New ones soon outvote them."""
    seconds = [0.4 + 0.001 * step for step in range(40)]
    state = profile() | {"measured": [[[32, seconds]], [[32, seconds]]], "last_split": [32, 32]}
    for ((_, kept),) in planner("auto", 2, 64, profile=state).state_dict()["measured"]:
        assert 3 <= len(kept) < 10
        assert kept == seconds[-len(kept) :]


def test_fixed_shares_take_no_profile() -> None:
    assert planner([1, 1], 2, 64, profile=profile()).schedule.newest.local_batches == (32, 32)


@pytest.mark.parametrize(
    ("change", "world_size", "global_batch"),
    [
        ({}, 2, 32),
        ({}, 3, 64),
        ({"version": 1}, 2, 64),
        ({"last_split": []}, 2, 64),
        ({"measured": [1, 2]}, 2, 64),
        ({"measured": [[], []]}, 2, 64),
        ({"measured": [[[4, [1.0]]]]}, 2, 64),
        ({"measured": [[[4, [1.0]]], [[4, [math.nan]]]]}, 2, 64),
        ({"measured": [[[4, []]], [[4, [1.0]]]]}, 2, 64),
        ({"measured": None}, 2, 64),
        ({"measured": "ab"}, 2, 64),
        ({"exposed_communication": [[math.nan], []]}, 2, 64),
        ({"version": None}, 2, 64),
    ],
)
def test_a_profile_of_another_job_or_a_damaged_one_raises(change, world_size, global_batch) -> None:
    """With errors that the caller catches, so that it can ignore the profile."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        planner("auto", world_size, global_batch, profile=profile() | change)


@pytest.mark.parametrize("entry", ["version", "world_size", "measured", "exposed_communication", "last_split"])
def test_a_profile_without_one_of_its_entries_raises(entry) -> None:
    state = profile()
    del state[entry]
    with pytest.raises(KeyError, match=entry):
        planner("auto", 2, 64, profile=state)


def test_a_discarded_profile_leaves_a_run_that_knows_nothing() -> None:
    """Equal shares from the first step that is not drawn yet; then it decides as one without a profile does."""
    discarded, fresh = planner("auto", 2, 64, profile=profile()), planner("auto", 2, 64)
    discarded.discard_profile()
    (plan,) = discarded.update(step_reports(0, [-1, -1], [0.0, 0.0], drawn=2)).plans
    assert (plan.first_step, plan.local_batches, plan.reason) == (3, (32, 32), "equal")
    assert discarded.models() is None
    fresh.update(step_reports(0, [-1, -1], [0.0, 0.0], drawn=2))
    for step in range(40):  # from step 3 on both run with the equal split
        seconds = slow_second_rank(fresh.schedule.at(step + 3).local_batches)
        updates = [take(each, step + 3, seconds) for each in (discarded, fresh)]
        assert updates[0] == updates[1]
    assert discarded.schedule.newest == fresh.schedule.newest


def test_the_steps_that_a_discarded_profile_still_decided_are_taken_for_what_they_were() -> None:
    """The first measured step ran with the profile's split, not with the equal one that follows."""
    discarded = planner("auto", 2, 64, profile=profile())
    split = discarded.schedule.newest.local_batches
    discarded.discard_profile()
    discarded.update(step_reports(0, [-1, -1], [0.0, 0.0]))
    (plan,) = take(discarded, 0, [1.0, 1.0]).plans
    assert plan.reason == "explore"
    assert plan.predicted_seconds == pytest.approx(
        [b / first for b, first in zip(plan.local_batches, split, strict=True)]
    )


def test_without_a_profile_there_is_nothing_to_discard() -> None:
    for made in (planner("auto", 2, 64), planner([3, 1], 2, 64, profile=profile())):
        before = made.schedule.newest
        made.discard_profile()
        assert made.update(step_reports(0, [-1, -1], [0.0, 0.0])).plans == ()
        assert made.schedule.newest is before


# ---- data that the user shards ----


def test_where_the_user_shards_nothing_is_ever_decided() -> None:
    sharded: Planner = UserSharded()
    assert not sharded.is_exploring
    assert not sharded.fits_in_memory((1, 1))
    assert sharded.global_batch is None
    update = sharded.update(step_reports(0, [0, 0], [1.0, 2.0]))
    assert (update.plans, update.warnings, update.measured) == ((), (), ())
