"""From the user's `shares` to plans; what can't be used is said in one sentence."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.exchange.messages import TRAINS, StepMessage, StepMessages
from lightning_hetero.planning.planner import Planner, check_shares


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 250
    return text


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ("fair", "shares='fair' is unknown: use 'auto', 'equal', one number a rank such as [4, 1], or the path"),
        (3, "shares=3 has to be 'auto', 'equal', or one number a rank"),
        (None, "shares=None has to be 'auto', 'equal', or one number a rank"),
        (["a", "b"], "one number a rank such as [4, 1]"),
        ([[1], [2]], "one number a rank such as [4, 1]"),
        ([1, -2], "the share of rank 1 is -2; give a number of 0 or more"),
        ([math.nan, 1], "the share of rank 0 is nan"),
        ([1, math.inf], "the share of rank 1 is inf"),
        ([0, 0], "shares=[0, 0] add up to 0; at least one rank needs a share above 0"),
        ([], "add up to 0"),
        ([1], "shares=[1] has 1 number, but there are 2 ranks: give one a rank"),
        ([1, 2, 3], "shares=[1, 2, 3] has 3 numbers, but there are 2 ranks"),
        ((4, 1, 1), "3 numbers, but there are 2 ranks"),
    ],
)
def test_bad_shares(shares, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared below
        check_shares(shares, 2)
    assert sentence in one_sentence(error)
    with pytest.raises(ValueError):  # noqa: PT011 - the same
        Planner(shares, 2, 16)


def test_one_rank_too_many_is_said_in_good_english():
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared below
        check_shares([1, 2], 1)
    assert "has 2 numbers, but there is 1 rank:" in one_sentence(error)


@pytest.mark.parametrize("shares", ["auto", "equal", [3, 1], (3, 1), [0, 1], [0.25, 0.75], [1e300, 1e-300]])
def test_good_shares(shares):
    check_shares(shares)
    check_shares(shares, 2)
    plan = Planner(shares, 2, 16).schedule.newest
    assert plan.first_step == 0
    assert sum(plan.local_batches) == 16
    assert min(plan.local_batches) >= 1, "every rank computes something, also with a share of 0"


def test_shares_are_proportions():
    assert Planner([3, 1], 2, 16).schedule.newest.local_batches == (12, 4)
    assert Planner([1, 3], 2, 16).schedule.newest.local_batches == (4, 12)
    assert Planner("equal", 3, 16).schedule.newest.local_batches == (6, 5, 5)
    assert Planner([7, 1, 8], 3, 64).schedule.newest.local_batches == (28, 4, 32)
    assert Planner([3, 1], 2, 16, granularity=8).schedule.newest.local_batches == (8, 8)


@pytest.mark.parametrize(
    ("world_size", "global_batch", "options", "sentence"),
    [
        (4, 3, {}, "a global batch of 3 is smaller than the number of ranks, 4"),
        (2, 9, {"granularity": 4}, "not a multiple of granularity 4"),
        (3, 8, {"granularity": 4}, "4 more than the global batch 8"),
    ],
)
@pytest.mark.parametrize("shares", ["auto", "equal"])
def test_a_global_batch_that_can_not_be_split(shares, world_size, global_batch, options, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared below
        Planner(shares, world_size, global_batch, **options)
    assert sentence in one_sentence(error)


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
    planner = Planner(shares, world_size, world_size + more, minimum=minimum)
    plan = planner.schedule.newest
    assert plan.global_batch == world_size + more
    assert plan.world_size == world_size
    assert planner.minimum == (2 if minimum == 2 and more >= world_size else 1)
    assert min(plan.local_batches) >= planner.minimum


@pytest.mark.parametrize("shares", ["equal", [3, 1]])
def test_only_auto_learns(shares):
    planner = Planner(shares, 2, 16)
    for step in range(20):
        assert planner.observe([step, step], [0.1, 1.0], step + 3) is None
    assert len(planner.schedule.plans) == 1


@pytest.mark.parametrize("ahead", [0, 3, 40])
def test_auto_gives_the_slow_rank_less_from_a_step_that_is_not_drawn_yet(ahead):
    """Rank 1 needs four times as long for a sample. Two planners that hear the same decide the same."""
    planners = [Planner("auto", 2, 50) for _ in range(2)]
    assert planners[0].schedule.newest.reason == "equal"
    for step in range(200):
        split = planners[0].schedule.at(step).local_batches
        seconds = [0.01 + 0.01 * split[0], 0.01 + 0.04 * split[1]]
        drawn = step + ahead
        decided = [planner.observe([step] * len(seconds), seconds, drawn) for planner in planners]
        assert decided[0] == decided[1]
        if decided[0] is not None:
            assert decided[0].first_step > drawn
            assert planners[0].schedule.newest is decided[0]
    assert planners[0].schedule.newest.local_batches == (40, 10)


def test_auto_never_takes_a_step_back_in_time():
    """A pass that was left early was drawn further than the next one: plans still start in order."""
    planner = Planner("auto", 2, 50)
    starts = []
    for step in range(60):
        split = planner.schedule.at(step).local_batches
        plan = planner.observe(
            [step, step], [0.01 + 0.01 * split[0], 0.01 + 0.04 * split[1]], step + (30 if step < 5 else 0)
        )
        starts += [plan.first_step] if plan is not None else []
    assert starts == sorted(starts)
    assert len(starts) >= 2


def test_one_rank_has_nothing_to_balance():
    planner = Planner("auto", 1, 7)
    assert planner.schedule.newest.local_batches == (7,)
    assert all(planner.observe([step], [0.1], step) is None for step in range(10))


def test_ranks_may_tell_at_different_times() -> None:
    """A rank whose device is some steps behind its host tells later; a step counts once all ranks have told of it."""
    prompt, late = (Planner("auto", 2, 64) for _ in range(2))
    decided: list[list[tuple[int, ...]]] = [[], []]
    for step in range(40):
        for number, planner in enumerate((prompt, late)):
            told = [step, step] if number == 0 else [step, step - 2]
            plan = planner.observe(told, [0.1, 1.0 if told[1] >= 0 else 0.0], step)
            if plan is not None:
                decided[number].append(plan.local_batches)
    assert decided[0]
    assert decided[0][0] == decided[1][0]


def test_what_one_rank_never_tells_is_forgotten() -> None:
    """Nothing is decided, and memory stays bounded, while a rank has no measurement."""
    planner = Planner("auto", 2, 64)
    for step in range(500):
        assert planner.observe([step, -1], [0.1, 0.0], step) is None
    assert len(planner._told) <= Planner.PATIENCE + 1


def test_the_first_plan_follows_a_probe_where_nothing_else_is_known() -> None:
    plan = Planner("auto", 2, 64, speeds=[4.0, 1.0]).schedule.newest
    assert (plan.first_step, plan.local_batches, plan.reason) == (0, (47, 17), "probe")
    assert Planner("auto", 2, 64, speeds=[1.1, 1.0]).schedule.newest.reason == "equal"
    for shares in ("equal", [1, 1]):
        assert Planner(shares, 2, 64, speeds=[4.0, 1.0]).schedule.newest.local_batches == (32, 32)


def told(planner: Planner, step: int, drawn: int, measured: int) -> bool:
    """Whether it asks, after ranks of which the second is slow have told of a step."""
    split = planner.schedule.at(max(measured, 0)).local_batches
    rows = [
        StepMessage(TRAINS, step, last_drawn=drawn, measured_step=measured, compute_seconds=b * pace).row()
        for b, pace in zip(split, (0.01, 0.04), strict=True)
    ]
    planner.update(StepMessages(np.array(rows)).reports())
    return planner.wants_reports_now


def test_it_asks_before_a_batch_is_drawn_while_that_may_change_the_plan() -> None:
    planner = Planner("auto", 2, 64)
    assert not planner.wants_reports_now, "nothing is measured before the first step"
    assert told(planner, 0, 0, -1)
    assert told(planner, 1, 0, 0)
    assert planner.schedule.newest.first_step == 1, "in force for the very next batch"
    assert not told(planner, 1, 2, 1), "loaders have drawn the next batch already"
    for step in range(2, 40):
        told(planner, step, step, step - 1)
    assert not planner.wants_reports_now, "the plan has settled"
    assert not told(Planner("equal", 2, 64), 0, 0, -1)


def test_it_does_not_ask_for_ever_where_no_step_can_be_measured() -> None:
    """Every batch of an epoch may be a short one."""
    planner = Planner("auto", 2, 64)
    asked = [told(planner, step, step, -1) for step in range(20)]
    assert asked == [True] * (Planner.IN_VAIN - 1) + [False] * (21 - Planner.IN_VAIN)
    assert told(planner, 20, 20, 19), "something is measured after all"
