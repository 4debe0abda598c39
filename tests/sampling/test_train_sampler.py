"""How a global batch is split, the shares that follow, and which samples a rank takes."""

import random
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping
from lightning_hetero.sampling.position import EpochPasses, Position
from lightning_hetero.sampling.train_sampler import (
    LocalBatchSampler,
    LocalBatchSizeSampler,
    PendingShares,
    Share,
    local_indices,
    split,
)
from tests.pure.all_ranks import plans
from tests.sampling.samplers import agreeing


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 2), st.data())
def test_any_batch_is_split_in_full(size, world_size, minimum, data):
    local_batches = data.draw(plans(world_size, data.draw(st.integers(2 * world_size, 100)), minimum))
    counts = split(size, local_batches, minimum)
    assert len(counts) == world_size
    assert sum(counts) == size
    assert min(counts) >= 0
    if size == sum(local_batches):
        assert counts == local_batches
    if size >= minimum:
        assert all(c == 0 or c >= minimum for c in counts), "nobody computes with less than the minimum"
    if size >= world_size * minimum:
        assert min(counts) >= minimum, "nobody borrows when there is enough for all"
    else:
        assert sum(c > 0 for c in counts) == max(1, size // minimum), "as many as can compute"
    indices = list(range(size))
    parts = [local_indices(indices, counts, rank, minimum) for rank in range(world_size)]
    assert list(chain.from_iterable(p for p, c in zip(parts, counts, strict=True) if c)) == indices
    assert all(len(p) == min(minimum, size) for p, c in zip(parts, counts, strict=True) if not c)


def test_short_batches_go_to_the_largest_shares():
    assert split(1, (1, 5, 2)) == (0, 1, 0)
    assert split(2, (1, 5, 2)) == (0, 1, 1)
    assert split(5, (2, 6, 4), 2) == (0, 3, 2)
    assert split(1, (2, 6, 4), 2) == (0, 1, 0)
    assert split(8, (12, 4)) == (6, 2)
    assert split(2, (15, 1)) == (1, 1)


def last_share(*, loads_in_process: bool, size: int) -> Share:
    """The share of the last of two global batches on the rank with the smaller local batch."""
    passes = EpochPasses(GlobalBatches(range(size), Grouping(4), 1, agreeing), lambda: Position(0, 0))
    sampler = LocalBatchSampler(passes, Schedule(Plan(0, (3, 1))), 1, minimum=1, loads_in_process=loads_in_process)
    list(sampler)
    return sampler.pending_shares.take(1)


def test_a_borrowed_share_knows_the_random_state_before_its_batch_was_loaded():
    share = last_share(loads_in_process=True, size=5)
    before = float(torch.rand(())), np.random.rand(), random.random()
    assert share.borrowed
    share.random_state.restore()
    assert (float(torch.rand(())), np.random.rand(), random.random()) == before


@pytest.mark.parametrize(("loads_in_process", "size"), [(False, 5), (True, 8)])
def test_other_shares_know_no_random_state(loads_in_process, size):
    assert last_share(loads_in_process=loads_in_process, size=size).random_state is None


def test_a_batch_behind_the_strategys_back():
    pending_shares = PendingShares(2)
    pending_shares.add(Share(4, (1, 1), borrowed=False, checksum=0))
    with pytest.raises(RuntimeError, match=r"rank 2 trains on global batch 3, but its loader has drawn \[4\]"):
        pending_shares.take(3)
    pending_shares.take(4)
    pending_shares.add(Share(5, (1, 1), borrowed=False, checksum=0))
    pending_shares.take(5)
    with pytest.raises(RuntimeError, match=r"global batch 4, but its loader has drawn \[5\]"):
        pending_shares.take(4)
    with pytest.raises(RuntimeError, match="has drawn none"):
        PendingShares(0).take(0)


@given(st.integers(1, 5), st.integers(1, 2), st.data())
def test_counts_for_iterable_data_follow_the_plan(world_size, minimum, data):
    first, second = data.draw(plans(world_size, 20, minimum)), data.draw(plans(world_size, 20, minimum))
    schedule = Schedule(Plan(0, first))
    schedule.append(Plan(6, second))
    for rank in range(world_size):
        sampler = LocalBatchSizeSampler(
            schedule,
            rank,
            global_batch=20,
            minimum=minimum,
            position=lambda: Position(1, 4),
            pending_shares=PendingShares(rank),
        )
        batches = list(islice(sampler, 4))
        assert [len(batch) for batch in batches] == [first[rank]] * 2 + [second[rank]] * 2
        assert sampler.pending_shares.last_drawn == 7
        assert sampler.pending_shares.take(6).counts == second
