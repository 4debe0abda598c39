"""What all ranks train on together: up to 16 of them with loaders that draw ahead, all in one process."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from lightning_hetero.sampling.global_batches import Grouping
from tests.pure.all_ranks import Job, plans, single, steps
from tests.sampling.samplers import SOURCES, Forever, LengthDraws, Own, Units, Unsized

# ---- coverage ----


@given(st.data(), st.integers(1, 16), st.integers(1, 2), st.booleans(), st.sampled_from([*SOURCES, "units"]))
def test_every_index_once_in_order_whatever_the_plans(data, world_size, minimum, drop_last, kind):
    """G1 and G3 over sizes, splits, re-plans during a run, loaders that prefetch, and several epochs."""
    global_batch = data.draw(st.integers(minimum * world_size, minimum * world_size + 20), "global batch")
    size = data.draw(st.integers(1, 70), "size")
    if kind == "units":
        own = data.draw(st.integers(1, 6), "own batch")
        units = -(-global_batch // own)
        global_batch = units * own
        source, grouping = Units(size, own), Grouping(units, batched=True)
    else:
        source, grouping = SOURCES[kind](size), Grouping(global_batch, drop_last=drop_last)
    ahead = data.draw(st.lists(st.integers(0, 5), min_size=world_size, max_size=world_size), "ahead")
    job = Job(source, grouping, data.draw(plans(world_size, global_batch, minimum)), minimum=minimum, ahead=ahead)

    def replan():
        if data.draw(st.integers(0, 3)):
            return None
        return data.draw(plans(world_size, global_batch, minimum)), data.draw(st.integers(0, 3))

    for _ in range(3):
        job.run(replan=replan)
    batches = steps(job)
    assert batches == [batch for epoch in job.agreed for batch in epoch]
    full = [batch for batch in batches if len(batch) != global_batch]
    assert len(full) <= (0 if drop_last and kind != "units" else 3), "only the last of an epoch is short"
    if kind not in ("entropy", "length draws", "units"):
        per_epoch = size // global_batch * global_batch if drop_last else size
        assert sum(map(len, batches)) == 3 * per_epoch
    if kind in ("sequential", "list"):
        assert list(chain.from_iterable(batches)) == 3 * list(range(per_epoch))
    if kind in ("shuffled", "generator") and not drop_last:
        flat = list(chain.from_iterable(batches))
        assert [sorted(flat[e * size : (e + 1) * size]) for e in range(3)] == [list(range(size))] * 3
    for rank in job.ranks:  # the plan in force is the one that was used
        for share, _ in rank.trained:
            plan = rank.schedule.at(share.step)
            assert share.checksum == plan.checksum
            if sum(share.counts) == global_batch:
                assert share.counts == plan.local_batches
    if kind != "entropy":
        assert batches == single(source, grouping, 3), "what one process trains on"


# ---- epochs ----


@pytest.mark.parametrize("kind", ["shuffled", "weighted", "own", "units"])
def test_epochs_differ_and_come_again(kind):
    source = Units(40, 4) if kind == "units" else SOURCES[kind](40)
    grouping = Grouping(2, batched=True) if kind == "units" else Grouping(8)
    batches = single(source, grouping, 2)
    assert batches[:5] != batches[5:]
    torch.rand(7)
    assert batches == single(source, grouping, 2)


@pytest.mark.parametrize("kind", ["own", "units"])
def test_set_epoch_of_samplers_and_batch_samplers(kind):
    source = Own(9) if kind == "own" else Units(9, 2)
    job = Job(source, Grouping(2, batched=kind == "units"), (1, 1))
    job.epoch = 4
    for _ in range(2):
        job.run(passes=2)
    for rank in job.ranks:
        assert rank.global_batches.sampler.__class__ is source.__class__
        assert set(rank.global_batches.sampler.epochs) == {4, 5}
        if kind == "units":
            assert set(rank.global_batches.sampler.sampler.epochs) == {4, 5}
    assert source.epochs == [], "each rank has its own"


@pytest.mark.parametrize("kind", [*SOURCES, "unsized"])
@pytest.mark.parametrize("ahead", [[0, 0], [3, 1]])
def test_a_cycled_loader_goes_on_with_another_pass(kind, ahead):
    """`max_size_cycle` reads a loader again within the epoch: steps go on, orders differ, all ranks agree."""
    source = Unsized(10) if kind == "unsized" else SOURCES[kind](10)
    job = Job(source, Grouping(4), (3, 1), ahead=ahead)
    for _ in range(2):
        job.run(passes=3)
    batches = steps(job)
    if kind == "unsized":
        assert [index // 100 for batch in batches for index in batch] == 6 * list(range(10))
        assert len({tuple(batch) for batch in batches}) == 18
        return
    assert len(batches) == sum(map(len, job.agreed))
    assert batches == list(chain.from_iterable(job.agreed))
    if kind in ("shuffled", "weighted", "own"):
        assert len({str(drawn) for drawn in job.agreed}) == 6


@pytest.mark.parametrize("kind", ["shuffled", "own", "unsized"])
def test_a_cycled_loader_that_is_left_early_goes_on_where_training_stands(kind):
    job = Job(Unsized(40) if kind == "unsized" else SOURCES[kind](40), Grouping(4), (3, 1), ahead=[2, 5])
    job.run(stop=4)
    job.epoch = 0
    job.run(stop=3)
    assert [share.step for share, _ in job.ranks[0].trained] == list(range(7))
    steps(job)


@pytest.mark.parametrize("kind", ["shuffled", "entropy", "unsized", "units"])
@pytest.mark.parametrize("ahead", [0, 2, 30])
def test_asking_again_before_training_loses_nothing(kind, ahead):
    """Lightning makes the first iterator of a run twice; what the first one prefetched is not lost."""
    source = Unsized(23) if kind == "unsized" else Units(23, 2) if kind == "units" else SOURCES[kind](23)
    job = Job(source, Grouping(2, batched=True) if kind == "units" else Grouping(4), (3, 1))
    for rank in job.ranks:
        rank.begin()
        rank.fill(ahead)
    first = [list(rank.queue) for rank in job.ranks]
    job.run()
    assert len(steps(job)) == 6
    for rank, queue in zip(job.ranks, first, strict=True):
        assert [indices for _, indices in rank.trained][: len(queue)] == queue
    if kind == "unsized":
        assert [index // 100 for batch in steps(job) for index in batch] == list(range(23))


def test_lengths_are_those_of_the_pass():
    job = Job(SequentialSampler(range(10)), Grouping(4), (3, 1))
    for rank in job.ranks:
        assert len(rank.sampler) == 3
    job.run()
    job = Job(LengthDraws(30), Grouping(4), (3, 1), ahead=[1, 0])
    for _ in range(5):
        for rank in job.ranks:
            rank.begin()
        assert len({len(rank.sampler) for rank in job.ranks}) == 1
        before = job.step
        expected = len(job.ranks[0].sampler)
        job.run()
        assert job.step - before == expected
    assert len({len(drawn) for drawn in job.agreed}) > 1, "the passes should differ in length for this test"


def test_dropping_the_last_may_leave_nothing():
    job = Job(SequentialSampler(range(3)), Grouping(4, drop_last=True), (3, 1))
    assert len(job.ranks[0].sampler) == 0
    job.run()
    assert steps(job) == []


# ---- endless ----


@given(st.integers(1, 6), st.lists(st.integers(0, 4), min_size=6, max_size=6), st.data())
def test_a_sampler_that_never_ends(world_size, ahead, data):
    """It is drawn as it is needed, and a loader that reads ahead changes nothing."""
    job = Job(Unsized(None), Grouping(7), data.draw(plans(world_size, 7)), ahead=ahead)
    for _ in range(2):
        job.run(stop=5)
    batches = steps(job)
    assert [index // 100 for batch in batches for index in batch] == 2 * list(range(35))
    alone = Job(Unsized(None), Grouping(7), [7])
    for _ in range(2):
        alone.run(stop=5)
    assert batches == steps(alone)
    with pytest.raises(TypeError, match="Unsized has no length"):
        len(job.ranks[0].sampler)


def test_a_length_that_is_far_exceeded_is_where_the_pass_ends():
    """Some samplers never end and rely on the loader's length, which a single process respects too."""
    job = Job(Forever(10), Grouping(4), (3, 1))
    job.run()
    assert list(map(len, steps(job))) == [4, 4, 2]
