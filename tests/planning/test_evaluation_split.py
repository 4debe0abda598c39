"""How the samples of an evaluation are split into steps, and each step over the ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.evaluation_split import EvaluationTimes, full_steps, split_step, step_sizes
from lightning_hetero.planning.step_time import StepTimeModel

RANKS = st.integers(1, 16)
BATCHES = st.lists(st.integers(1, 9), max_size=40)


def proportional(*shares: float) -> list[StepTimeModel]:
    return [StepTimeModel((0, 1), (0.0, 1 / share), 1 / share) for share in shares]


# ---- steps ----


@given(BATCHES, RANKS, st.booleans())
def test_every_sample_has_a_step_and_every_rank_a_sample_in_it(batches, world_size, equal):
    steps = step_sizes(batches, world_size, equal=equal)
    assert sum(steps) == sum(batches)
    assert len(steps) <= -(-len(batches) // world_size)
    if sum(batches) >= world_size:
        assert min(steps) >= world_size
    else:
        assert len(steps) == bool(batches)


@given(st.integers(1, 9), st.integers(0, 200), RANKS)
def test_equal_steps_differ_by_one_sample_at_most(batch, samples, world_size):
    batches = [batch] * (samples // batch) + [samples % batch] * (samples % batch > 0)
    steps = step_sizes(batches, world_size, equal=True)
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert list(steps) == sorted(steps, reverse=True)
    if batch > 1 and samples >= world_size:
        assert max(steps) <= batch * world_size
        assert len(steps) == -(-samples // (batch * world_size)), "as many as plain DDP takes"


@given(st.integers(2, 9), st.integers(1, 200), RANKS)
def test_unequal_steps_are_full_but_for_the_last_two(batch, samples, world_size):
    batches = [batch] * (samples // batch) + [samples % batch] * (samples % batch > 0)
    steps = step_sizes(batches, world_size, equal=False)
    assert set(steps[:-2]) <= {batch * world_size}
    assert max(steps) <= batch * world_size


def test_the_last_steps_are_cut_so_that_no_rank_is_without_a_sample():
    assert step_sizes([4] * 8 + [1], 2, equal=False) == (8, 8, 8, 7, 2)
    assert step_sizes([4] * 8 + [1], 2, equal=True) == (7, 7, 7, 6, 6)
    assert step_sizes([1] * 5, 4, equal=False) == step_sizes([1] * 5, 4, equal=True) == (5,)
    assert full_steps([1] * 5, 4) == [4, 1]
    assert step_sizes([1, 1], 3, equal=True) == (2,)
    assert step_sizes([], 3, equal=True) == step_sizes([], 3, equal=False) == ()


# ---- ranks ----


@given(st.integers(0, 60), st.lists(st.floats(0.01, 100), min_size=1, max_size=16))
def test_a_step_is_split_so_that_the_last_rank_is_done_early(size, shares):
    counts = split_step(size, proportional(*shares))
    assert sum(counts) == size
    if size < len(shares):
        assert set(counts) <= {0, 1}
        slowest = min((s for s, n in zip(shares, counts, strict=True) if n), default=float("inf"))
        assert all(s <= slowest for s, n in zip(shares, counts, strict=True) if not n)
        return
    assert min(counts) >= 1
    last = max(range(len(shares)), key=lambda rank: counts[rank] / shares[rank])
    makespan = counts[last] / shares[last]
    others = [(n + 1) / s for rank, (n, s) in enumerate(zip(counts, shares, strict=True)) if rank != last]
    assert counts[last] == 1 or all(moved >= makespan * (1 - 1e-9) for moved in others), "no sample is better elsewhere"


def test_examples_of_splits():
    assert split_step(8, proportional(3, 1)) == (6, 2)
    assert split_step(8, proportional(9, 1)) == (7, 1)
    assert split_step(2, proportional(1, 5, 2)) == (0, 1, 1)
    assert split_step(8, proportional(1, 1e-9)) == (7, 1), "every rank takes part"


# ---- times ----


def seconds(times, key, batch, proportions):
    return tuple(model.seconds(batch) for model in times.models(key, batch, proportions))


def test_each_stage_has_times_of_its_own():
    times = EvaluationTimes(2)
    assert seconds(times, "val", 8, (3, 1)) == pytest.approx((8 / 3, 8))
    times.update([{"val": [(8, 0.9), (8, 0.1), (8, 0.1), (4, 0.05)]}, {"val": [(8, 0.5)] * 3}])
    assert seconds(times, "val", 8, (3, 1)) == pytest.approx((0.1, 0.5))
    assert seconds(times, "test", 8, (3, 1)) == pytest.approx((8 / 3, 8))


def test_a_rank_that_was_never_measured_follows_its_proportion_beside_those_that_were():
    times = EvaluationTimes(3)
    times.update([{"val": [(8, 0.1)]}, {"val": [(8, 0.3)]}, {}])
    assert seconds(times, "val", 8, (3, 1, 2)) == pytest.approx((0.1, 0.3, 0.15))


def test_a_fixed_cost_of_each_batch_counts():
    """The second rank takes 0.3 s for any batch of up to 8 samples."""
    times = EvaluationTimes(2)
    times.update([{"val": [(2, 0.1), (4, 0.2), (8, 0.4)] * 3}, {"val": [(2, 0.3), (4, 0.3), (8, 0.3)] * 3}])
    assert split_step(14, times.models("val", 7, (1, 1))) == (6, 8)


def test_fixed_shares_do_not_follow_times():
    times = EvaluationTimes(2, adaptive=False)
    times.update([{"val": [(8, 0.1)]}, {"val": [(8, 0.3)]}])
    assert seconds(times, "val", 8, (1, 1)) == (8, 8)
