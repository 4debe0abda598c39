"""Which ranks pay, and from when on: against all subsets of ranks and all their splits, and against closed forms."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.efficiency import LARGEST_FACTOR, MARGIN, EfficiencyModel
from lightning_hetero.planning.step_time import StepTimeModel


def line(fixed: float, each: float) -> StepTimeModel:
    return StepTimeModel((0,), (fixed,), each)


def without_communication(models: list[StepTimeModel], **limits: int | list[int]) -> EfficiencyModel:
    return EfficiencyModel(models, [0.0] * len(models), **limits)


points = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.5, 2.0, 6.0]) | st.floats(0.01, 50)),
    min_size=1,
    max_size=4,
)
fitted = points.map(lambda measured: StepTimeModel.fit(*zip(*measured, strict=True)))
curves = fitted | st.builds(line, st.floats(0, 20), st.floats(0.01, 5))


@st.composite
def cases(draw: st.DrawFn) -> tuple[EfficiencyModel, int]:
    """Up to 4 ranks, and a global batch that is enough for all and not too much."""
    models = draw(st.lists(curves, min_size=1, max_size=4))
    size, step = len(models), draw(st.sampled_from([1, 1, 2]))
    communication = draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=size, max_size=size))
    least = draw(st.integers(1, 2))
    most = draw(st.none() | st.lists(st.integers(2, 5), min_size=size, max_size=size))
    upper = max(size * least, min(sum(most) if most else 99, size * least + 5))
    maximum = most and [step * b for b in most]
    model = EfficiencyModel(models, communication, step * least, step, maximum)
    return model, step * draw(st.integers(size * least, upper))


def split_seconds(model: EfficiencyModel, ranks: tuple[int, ...], split: tuple[int, ...]) -> float:
    together = len(ranks) > 1
    return max(
        model.models[r].seconds(b) + together * model.exposed_communication[r]
        for r, b in zip(ranks, split, strict=True)
    )


def by_hand(model: EfficiencyModel, ranks: tuple[int, ...], global_batch: int) -> float:
    """The least of all splits."""
    allowed = [
        range(model.minimum, min(model.maximum[r] if model.maximum else 99, global_batch) + 1, model.granularity)
        for r in ranks
    ]
    splits = (split for split in itertools.product(*allowed) if sum(split) == global_batch)
    return min((split_seconds(model, ranks, split) for split in splits), default=math.inf)


def subsets(size: int) -> list[tuple[int, ...]]:
    return [ranks for n in range(1, size + 1) for ranks in itertools.combinations(range(size), n)]


close = pytest.approx


@given(cases())
def test_every_subset_takes_what_its_best_split_takes(case):
    model, global_batch = case
    for ranks in subsets(len(model.models)):
        assert model.step_seconds(global_batch, ranks) == close(by_hand(model, ranks, global_batch), rel=1e-5)


@given(cases())
def test_a_rank_that_does_not_pay_costs_more_than_the_margin(case):
    """And the ranks that pay are as fast as the fastest of all subsets, within the margin."""
    model, global_batch = case
    everybody = tuple(range(len(model.models)))
    fastest = min(by_hand(model, ranks, global_batch) for ranks in subsets(len(everybody)))
    paying = model.paying(global_batch)
    assert paying
    seconds, all_seconds = (by_hand(model, ranks, global_batch) for ranks in (paying, everybody))
    slack = 1 + 1e-5
    if paying == everybody:
        assert all_seconds <= (1 + MARGIN) ** 2 * fastest * slack
        return
    assert seconds <= (1 + MARGIN) * fastest * slack
    assert all_seconds * slack > (1 + MARGIN) * seconds
    for rank in set(everybody) - set(paying):
        with_it = by_hand(model, tuple(sorted((*paying, rank))), global_batch)
        assert with_it * slack > fastest * (1 + MARGIN), "each of them by itself"


@given(cases(), st.data())
def test_a_rank_pays_from_its_global_batch_on(case, data):
    model, global_batch = case
    rank = data.draw(st.integers(0, len(model.models) - 1))
    first = model.pays_from(rank, global_batch)
    if rank in model.paying(global_batch) and first == global_batch:
        return
    if first is None:
        largest = min(LARGEST_FACTOR * global_batch, sum(model.maximum or [9**9]))
        assert rank not in model.paying(largest)
    else:
        assert first % model.granularity == 0
        assert global_batch < first <= LARGEST_FACTOR * global_batch
        assert rank in model.paying(first)
        assert rank not in model.paying(first - model.granularity)


@given(st.floats(0, 0.5), st.floats(0.001, 0.1), st.floats(0, 20), st.floats(0.001, 0.1), st.integers(2, 64))
def test_two_straight_lines(fixed, each, slow_fixed, slow_each, global_batch):
    """Rank 1 pays once rank 0 alone needs as long as rank 1 does for one sample, but for the margin."""
    model = without_communication([line(fixed, each), line(slow_fixed, slow_each)])
    least = slow_fixed + slow_each
    if least < fixed + each:  # it is rank 0 then that may not pay
        return
    first = max(math.ceil((least / (1 + MARGIN) - fixed) / each), global_batch)
    found = model.pays_from(1, global_batch)
    if first > LARGEST_FACTOR * global_batch + 1:
        assert found is None
    elif found is None:
        assert first >= LARGEST_FACTOR * global_batch
    else:
        assert abs(found - first) <= 1
    if 1 not in model.paying(global_batch):
        assert model.paying(global_batch) == (0,)
        assert model.step_seconds(global_batch, (0,)) == close(fixed + each * global_batch)


def test_the_measured_case():
    """ResNet-18 on quotas of 100 and 25: the fast one alone is faster at 64 samples, and slower at 256."""
    fast = StepTimeModel.fit([32, 48, 56, 60, 62, 64, 256], [0.244, 0.342, 0.384, 0.418, 0.439, 0.401, 1.666])
    slow = StepTimeModel.fit([2, 4, 8, 16, 32], [0.260, 0.355, 0.481, 0.660, 1.138])
    model = EfficiencyModel([fast, slow], [0.01, 0.2])
    assert model.paying(64) == (0,)
    assert 0.40 <= model.step_seconds(64, (0,)) <= 0.43
    assert 64 < model.pays_from(1, 64) < 128
    assert model.paying(256) == (0, 1)


def test_alone_there_is_no_communication():
    model = EfficiencyModel([line(0, 1), line(0, 1)], [10.0, 10.0])
    assert model.split_seconds((5, 5)) == 15
    assert model.step_seconds(10, (0,)) == 10
    assert model.paying(10) == (0,)
    assert model.paying(100) == (0, 1)
    assert model.pays_from(1, 10) in (20, 21), "half of it and 10 s against all of it, but for the margin"


def test_equal_ranks_that_delay_all_others_are_left_out_together():
    """Leaving out only one of them would gain nothing. The faster of the slow ranks pays again first."""
    model = without_communication([line(0.1, 0.01), line(0.1, 0.01), line(3, 0.1), line(3, 0.1), line(9, 0.1)])
    assert model.step_seconds(40, (0, 1, 3, 4)) == model.step_seconds(40, (0, 1, 2, 3, 4))
    assert model.paying(40) == (0, 1)
    assert model.pays_from(2, 40) == model.pays_from(3, 40) < model.pays_from(4, 40)


def test_the_minimum_is_what_a_rank_has_to_do():
    """Rank 1 could do one sample in a step of rank 0 alone, and not the two that it needs at least."""
    models = [line(0, 0.1), line(0.5, 0.3)]
    assert without_communication(models).paying(9) == (0, 1)
    assert without_communication(models, minimum=2).paying(9) == (0,)


def test_never_paying_is_none_and_always_paying_is_the_global_batch_itself():
    model = without_communication([line(1, 0.0001), line(1000, 1)])
    assert model.paying(64) == (0,)
    assert model.pays_from(1, 64) is None
    assert model.pays_from(0, 64) == 64
    same = without_communication([line(5, 0), line(5, 0)])
    assert same.paying(2) == (0, 1), "no harm in taking part"


def test_a_rank_that_is_needed_for_its_memory_pays():
    model = without_communication([line(0, 0.01), line(100, 1)], maximum=[60, 60])
    assert model.paying(60) == (0,)
    assert model.paying(61) == (0, 1)
    assert model.pays_from(1, 60) == 61
    assert model.step_seconds(121, (0, 1)) == math.inf


@given(cases())
def test_the_limit_is_the_sum_of_all_alone(case):
    model, global_batch = case
    expected = sum(global_batch / m.seconds(global_batch) for m in model.models)
    assert model.throughput_limit(global_batch) == close(expected)


def test_perfect_scaling_reaches_the_limit():
    model = without_communication([line(0, 0.01), line(0, 0.04)])
    assert model.step_seconds(100, (0, 1)) == close(0.8) == model.split_seconds((80, 20))
    assert close(model.throughput_limit(100)) == 100 / 0.8


def test_many_ranks_are_quick():
    """A few allocations, not one for each of 3000 ranks."""
    model = without_communication([line(0.01 + i / 1000, 0.001) for i in range(3000)])
    assert len(model.paying(6000)) < 300
