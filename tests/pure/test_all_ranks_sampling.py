"""The global stream and its slices: up to 16 ranks with loaders that draw ahead, all in one process."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler

from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.sampling.global_batches import (
    Chunks,
    GlobalBatches,
    PrivateRandomState,
    fingerprint,
)
from lightning_hetero.sampling.train_sampler import (
    EpochPasses,
    LocalBatchSampler,
    LocalBatchSizeSampler,
    PendingShares,
    Position,
    Share,
    cut,
    split,
)

SEED = 11

# ------------------------------------------------------------------------------------------------------ users' samplers


class Own(Sampler[int]):
    """Draws from all global generators, depends on the epoch, and remembers it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            draws = int(torch.randint(1000, ())), np.random.randint(1000), random.randrange(1000)
            yield (sum(draws) + self.epoch) % 1000

    def __len__(self) -> int:
        return self.size


class LengthDraws(Own):
    """As some geographic samplers do: `len` draws the pass, and another pass may be longer."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(1000, (self.size + int(torch.randint(4, ())),)).tolist())

    def __len__(self) -> int:
        return len(list(iter(self)))


class Entropy(Own):
    """Draws from the system's entropy: differs on every rank and in every run."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng().integers(10**9, size=self.size).tolist())


class Units(Sampler[list[int]]):
    """A batch sampler that draws each of its batches as one."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.sampler = Own(size)
        self.batch_size = batch_size
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.sampler.size, self.batch_size):
            first = 1000 * int(torch.randint(1000, ()))
            yield [first + i for i in range(min(self.batch_size, self.sampler.size - start))]

    def __len__(self) -> int:
        return 1 + (self.sampler.size - 1) // self.batch_size


class Unsized(Sampler[int]):
    """Never says how long it is; ends after `size`, or not at all."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for number in count() if self.size is None else range(self.size):
            yield 100 * number + int(torch.randint(100, ()))


class Forever(Own):
    """Has a length, but goes on for ever."""

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(super(Forever, self).__iter__() for _ in count())


SOURCES: dict[str, Callable[[int], Any]] = {
    "sequential": lambda n: SequentialSampler(range(n)),
    "shuffled": lambda n: RandomSampler(range(n)),
    "generator": lambda n: RandomSampler(range(n), generator=torch.Generator().manual_seed(5)),
    "weighted": lambda n: WeightedRandomSampler([1.0 + i % 3 for i in range(n)], n),
    "list": lambda n: list(range(n)),
    "own": Own,
    "length draws": LengthDraws,
    "entropy": Entropy,
}

# ------------------------------------------------------------------------------------------------------- the simulation


@dataclass
class Rank:
    """One rank: its sampler, a loader that draws ahead, and what it was given."""

    sampler: LocalBatchSampler
    schedule: Schedule
    stream: GlobalBatches
    ahead: int
    iterator: Iterator[list[Any]] = field(default_factory=lambda: iter(()))
    queue: list[list[Any]] = field(default_factory=list)
    done: bool = False
    trained: list[tuple[Share, list[Any]]] = field(default_factory=list)

    def begin(self) -> None:
        self.iterator, self.queue, self.done = iter(self.sampler), [], False

    def fill(self, batches: int) -> None:
        while not self.done and len(self.queue) < batches:
            batch = next(self.iterator, None)
            if batch is None:
                self.done = True
            else:
                self.queue.append(batch)


class Job:
    """Ranks in one process; what they would tell each other goes through `agree`."""

    def __init__(
        self, source: Any, chunks: Chunks, plan: Sequence[int], *, minimum: int = 1, ahead: Sequence[int] = ()
    ) -> None:
        self.epoch = self.step = 0
        self.agreed: list[list[list[Any]]] = []
        self.stream_of_rank_0: list[list[Any]] = []
        self.borrowing: list[int] = []
        self.noise = random.Random(3)
        self.ranks = [
            self._rank(source, chunks, plan, rank, minimum, [*ahead, *[0] * 16][rank]) for rank in range(len(plan))
        ]

    def _rank(self, source: Any, chunks: Chunks, plan: Sequence[int], rank: int, minimum: int, ahead: int) -> Rank:
        draws = count()

        def agree(drawn: list[list[Any]], *, complete: bool) -> list[list[Any]]:
            if rank == 0:
                self.agreed.append(drawn)
            return self.agreed[next(draws)]

        stream = GlobalBatches(copy.deepcopy(source), chunks, SEED, agree)
        schedule = Schedule(Plan(0, tuple(plan)))
        drawing = EpochPasses(stream, lambda: Position(self.epoch, self.step))
        sampler = LocalBatchSampler(
            drawing, schedule, rank, minimum=minimum, on_borrow=lambda: self.borrowing.append(rank)
        )
        return Rank(sampler, schedule, stream, ahead)

    def disturb(self) -> None:
        """What dropout and augmentation do between two draws, by other amounts on every rank."""
        torch.rand(self.noise.randrange(4))
        np.random.rand(self.noise.randrange(4))
        for _ in range(self.noise.randrange(4)):
            random.random()

    @property
    def drawn(self) -> int:
        return max(rank.sampler.pending_shares.drawn for rank in self.ranks)

    def replan(self, local_batches: Sequence[int], later: int) -> None:
        first = max(self.drawn + 1, self.ranks[0].schedule.newest.first_step) + later
        for rank in self.ranks:
            rank.schedule.append(Plan(first, tuple(local_batches)))

    def run(
        self, passes: int = 1, replan: Callable[[], tuple[Sequence[int], int] | None] = lambda: None, stop: int = 10**9
    ) -> None:
        """One epoch: each rank's loader is read to its end `passes` times, or until `stop` steps."""
        taken = 0
        for _ in range(passes):
            for rank in self.ranks:
                self.disturb()
                rank.begin()
            while taken < stop:
                for rank in self.ranks:
                    rank.fill(1)
                if any(rank.done and not rank.queue for rank in self.ranks):
                    break
                for rank in self.ranks:
                    rank.fill(1 + rank.ahead)
                    batch = rank.queue.pop(0)
                    rank.trained.append((rank.sampler.pending_shares.take(self.step), batch))
                    self.disturb()
                self.step += 1
                taken += 1
                new = replan()
                if new is not None:
                    self.replan(*new)
            assert taken >= stop or all(rank.done and not rank.queue for rank in self.ranks), "ranks end together"
        self.epoch += 1


def steps(job: Job) -> list[list[Any]]:
    """The samples that count, step by step, in the order of the ranks; with everything checked that a step owes."""
    world_size = len(job.ranks)
    assert len({len(rank.trained) for rank in job.ranks}) == 1, "every rank takes the same number of steps"
    batches = []
    for step, parts in enumerate(zip(*(rank.trained for rank in job.ranks), strict=True)):
        shares = [share for share, _ in parts]
        assert {share.step for share in shares} == {step}
        assert len({(share.counts, share.checksum) for share in shares}) == 1, "all ranks split alike"
        assert [share.borrowed for share in shares] == [c == 0 for c in shares[0].counts]
        assert sum(share.borrowed for share in shares) <= world_size - 1
        own = [list(indices) for share, indices in parts if not share.borrowed]
        assert [len(indices) for indices in own] == [c for c in shares[0].counts if c]
        batch = list(chain.from_iterable(own))
        assert sum(shares[0].counts) == len(batch)
        for share, indices in parts:
            if share.borrowed:
                assert indices, "a rank that borrows still computes"
                assert indices == batch[: len(indices)]
        batches.append(batch)
    return batches


def single(source: Any, chunks: Chunks, epochs: int) -> list[list[Any]]:
    """What one process trains on."""
    job = Job(source, chunks, [10**6])
    for _ in range(epochs):
        job.run()
    return steps(job)


@st.composite
def plans(draw: Any, world_size: int, global_batch: int, minimum: int = 1) -> tuple[int, ...]:
    """Any split with at least `minimum` a rank."""
    rest = global_batch - world_size * minimum
    bounds = sorted(draw(st.lists(st.integers(0, rest), min_size=world_size - 1, max_size=world_size - 1)))
    return tuple(b - a + minimum for a, b in zip([0, *bounds], [*bounds, rest], strict=True))


# ------------------------------------------------------------------------------------------------------------- coverage


@given(st.data(), st.integers(1, 16), st.integers(1, 2), st.booleans(), st.sampled_from([*SOURCES, "units"]))
def test_every_index_once_in_order_whatever_the_plans(data, world_size, minimum, drop_last, kind):
    """G1 and G3 over sizes, splits, re-plans in the midst of a run, loaders that draw ahead, and several epochs."""
    global_batch = data.draw(st.integers(minimum * world_size, minimum * world_size + 20), "global batch")
    size = data.draw(st.integers(1, 70), "size")
    if kind == "units":
        own = data.draw(st.integers(1, 6), "own batch")
        units = -(-global_batch // own)
        global_batch = units * own
        source, chunks = Units(size, own), Chunks(units, batched=True)
    else:
        source, chunks = SOURCES[kind](size), Chunks(global_batch, drop_last=drop_last)
    ahead = data.draw(st.lists(st.integers(0, 5), min_size=world_size, max_size=world_size), "ahead")
    job = Job(source, chunks, data.draw(plans(world_size, global_batch, minimum)), minimum=minimum, ahead=ahead)

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
    assert len(job.borrowing) == sum(share.borrowed for rank in job.ranks for share, _ in rank.trained)
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
        assert batches == single(source, chunks, 3), "what one process trains on"


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
    parts = [cut(indices, counts, rank, minimum) for rank in range(world_size)]
    assert list(chain.from_iterable(p for p, c in zip(parts, counts, strict=True) if c)) == indices
    assert all(len(p) == min(minimum, size) for p, c in zip(parts, counts, strict=True) if not c)


def test_short_batches_go_to_the_largest_shares():
    assert split(1, (1, 5, 2)) == (0, 1, 0)
    assert split(2, (1, 5, 2)) == (0, 1, 1)
    assert split(5, (2, 6, 4), 2) == (0, 3, 2)
    assert split(1, (2, 6, 4), 2) == (0, 1, 0)
    assert split(8, (12, 4)) == (6, 2)
    assert split(2, (15, 1)) == (1, 1)


# --------------------------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize("kind", ["shuffled", "weighted", "own", "units"])
def test_epochs_differ_and_come_again(kind):
    source = Units(40, 4) if kind == "units" else SOURCES[kind](40)
    chunks = Chunks(2, batched=True) if kind == "units" else Chunks(8)
    batches = single(source, chunks, 2)
    assert batches[:5] != batches[5:]
    torch.rand(7)
    assert batches == single(source, chunks, 2)


@pytest.mark.parametrize("kind", ["own", "units"])
def test_set_epoch_of_samplers_and_batch_samplers(kind):
    source = Own(9) if kind == "own" else Units(9, 2)
    job = Job(source, Chunks(2, batched=kind == "units"), (1, 1))
    job.epoch = 4
    for _ in range(2):
        job.run(passes=2)
    for rank in job.ranks:
        assert rank.stream.source.__class__ is source.__class__
        assert set(rank.stream.source.epochs) == {4, 5}
        if kind == "units":
            assert set(rank.stream.source.sampler.epochs) == {4, 5}
    assert source.epochs == [], "each rank has its own"


@pytest.mark.parametrize("kind", [*SOURCES, "unsized"])
@pytest.mark.parametrize("ahead", [[0, 0], [3, 1]])
def test_a_cycled_loader_goes_on_with_another_pass(kind, ahead):
    """`max_size_cycle` reads a loader again within the epoch: steps go on, orders differ, no rank goes astray."""
    source = Unsized(10) if kind == "unsized" else SOURCES[kind](10)
    job = Job(source, Chunks(4), (3, 1), ahead=ahead)
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


def test_a_cycled_loader_is_asked_again_while_its_last_batch_still_waits():
    """Where a length is not known, Lightning fetches a batch ahead: training stands one step behind what was read."""
    position = Position(0, 5)
    drawing = EpochPasses(GlobalBatches(range(10), Chunks(4), SEED, lambda drawn, complete: drawn), lambda: position)
    sampler = LocalBatchSampler(drawing, Schedule(Plan(0, (3, 1))), 0, minimum=1)
    assert len(list(sampler)) == 3
    position = Position(0, 7)
    assert len(list(sampler)) == 3
    assert [sampler.pending_shares.take(step).step for step in (7, 8, 9, 10)] == [7, 8, 9, 10]


@pytest.mark.parametrize("kind", ["shuffled", "own", "unsized"])
def test_a_cycled_loader_that_is_left_early_goes_on_where_training_stands(kind):
    job = Job(Unsized(40) if kind == "unsized" else SOURCES[kind](40), Chunks(4), (3, 1), ahead=[2, 5])
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
    job = Job(source, Chunks(2, batched=True) if kind == "units" else Chunks(4), (3, 1))
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
    job = Job(SequentialSampler(range(10)), Chunks(4), (3, 1))
    for rank in job.ranks:
        assert len(rank.sampler) == 3
    job.run()
    job = Job(LengthDraws(30), Chunks(4), (3, 1), ahead=[1, 0])
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
    job = Job(SequentialSampler(range(3)), Chunks(4, drop_last=True), (3, 1))
    assert len(job.ranks[0].sampler) == 0
    job.run()
    assert steps(job) == []


# -------------------------------------------------------------------------------------------------------- random states


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("kind", [*SOURCES, "unsized", "units"])
def test_drawing_leaves_the_global_generators_alone(kind):
    source = Unsized(20) if kind == "unsized" else Units(20, 2) if kind == "units" else SOURCES[kind](20)
    before = states()
    stream = GlobalBatches(source, Chunks(4, batched=kind == "units"), SEED, lambda drawn, complete: drawn)
    drawing = EpochPasses(stream, lambda: Position(0, 0))
    sampler = LocalBatchSampler(drawing, Schedule(Plan(0, (3, 1))), 0, minimum=1)
    if not stream.endless:
        len(sampler)
    assert list(sampler)
    assert states() == before


def test_a_sampler_that_raises_leaves_the_global_generators_alone():
    class Broken(Own):
        def __iter__(self):
            yield int(torch.randint(9, ()))
            raise OSError("gone")

    before = states()
    with pytest.raises(OSError, match="gone"):
        GlobalBatches(Broken(3), Chunks(2), SEED, lambda drawn, complete: drawn).draw(0, 0)
    assert states() == before


def test_the_three_generators_are_seeded_and_kept():
    state, same, other = PrivateRandomState(5), PrivateRandomState(5), PrivateRandomState(6)

    def draws(state):
        with state.active():
            return float(torch.rand(())), np.random.rand(), random.random()

    first, second = draws(state), draws(state)
    torch.rand(3)
    assert (draws(same), draws(same)) == (first, second)
    assert not set(first) & set(second)
    assert not set(first) & set(draws(other))


def test_a_large_seed():
    assert list(PrivateRandomState(2**63 - 1)._read())
    stream = GlobalBatches(Own(4), Chunks(2), 2**32 + 1, lambda drawn, complete: drawn)
    stream.draw(0, 0)
    assert len(stream) == 2


# -------------------------------------------------------------------------------------------------------------- endless


@given(st.integers(1, 6), st.lists(st.integers(0, 4), min_size=6, max_size=6), st.data())
def test_a_sampler_that_never_ends(world_size, ahead, data):
    """It is drawn as it is needed, and nobody's drawing ahead moves it."""
    job = Job(Unsized(None), Chunks(7), data.draw(plans(world_size, 7)), ahead=ahead)
    for _ in range(2):
        job.run(stop=5)
    batches = steps(job)
    assert [index // 100 for batch in batches for index in batch] == 2 * list(range(35))
    alone = Job(Unsized(None), Chunks(7), [7])
    for _ in range(2):
        alone.run(stop=5)
    assert batches == steps(alone)
    with pytest.raises(TypeError, match="Unsized has no length"):
        len(job.ranks[0].sampler)


def test_an_endless_sampler_draws_no_more_than_it_must():
    drawn = []

    class Counting(Sampler[int]):
        def __iter__(self):
            for number in count():
                drawn.append(number)
                yield number

    stream = GlobalBatches(Counting(), Chunks(4), SEED, lambda drawn, complete: drawn)
    sampler = LocalBatchSampler(EpochPasses(stream, lambda: Position(0, 0)), Schedule(Plan(0, (3, 1))), 1, minimum=1)
    assert list(islice(sampler, 3)) == [[3], [7], [11]]
    assert len(drawn) <= 12


def test_an_endless_pass_does_not_pile_up():
    job = Job(Unsized(None), Chunks(2), (1, 1), ahead=[3, 0])
    job.run(stop=50)
    assert len(job.ranks[0].stream._drawn) < 10


def test_a_length_that_is_far_exceeded_is_where_the_pass_ends():
    """Some samplers go on for ever and trust the loader's length, as one process does."""
    job = Job(Forever(10), Chunks(4), (3, 1))
    job.run()
    assert list(map(len, steps(job))) == [4, 4, 2]


def test_only_the_first_batch_of_an_endless_sampler_is_compared():
    asked = []

    def agree(drawn, *, complete):
        asked.append((complete, drawn))
        return drawn

    stream = GlobalBatches(Unsized(None), Chunks(3), SEED, agree)
    stream.draw(0, 0)
    assert [(complete, len(drawn)) for complete, drawn in asked] == [(False, 1)]


def test_what_was_agreed_on_is_used():
    stream = GlobalBatches(SequentialSampler(range(4)), Chunks(2), SEED, lambda drawn, complete: [[8, 9]])
    stream.draw(0, 0)
    assert list(stream.batches(lambda: False)) == [[8, 9]]
    assert (len(stream), stream.first_batch) == (1, 2)
    stream.draw(0, 0)
    assert len(stream) == 1


# ---------------------------------------------------------------------------------------------------------- handing out


def test_a_batch_behind_the_strategys_back():
    pending_shares = PendingShares(2)
    pending_shares.add(Share(4, (1, 1), borrowed=False, checksum=0))
    with pytest.raises(RuntimeError, match=r"rank 2 trains on global batch 3, but its loader has handed out \[4\]"):
        pending_shares.take(3)
    pending_shares.take(4)
    pending_shares.add(Share(5, (1, 1), borrowed=False, checksum=0))
    pending_shares.take(5)
    with pytest.raises(RuntimeError, match=r"global batch 4, but its loader has handed out \[5\]"):
        pending_shares.take(4)
    with pytest.raises(RuntimeError, match="has handed out none"):
        PendingShares(0).take(0)


@given(st.integers(1, 5), st.integers(1, 2), st.data())
def test_counts_for_iterable_data_follow_the_plan(world_size, minimum, data):
    first, second = data.draw(plans(world_size, 20, minimum)), data.draw(plans(world_size, 20, minimum))
    schedule = Schedule(Plan(0, first))
    schedule.append(Plan(6, second))
    for rank in range(world_size):
        sampler = LocalBatchSizeSampler(
            schedule, rank, global_batch=20, minimum=minimum, position=lambda: Position(1, 4)
        )
        batches = list(islice(sampler, 4))
        assert [len(batch) for batch in batches] == [first[rank]] * 2 + [second[rank]] * 2
        assert sampler.pending_shares.drawn == 7
        assert sampler.pending_shares.take(6).counts == second


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints_compare_values():
    assert fingerprint([[torch.tensor(1), np.int64(2)]]) == fingerprint([[1, 2]])
    assert fingerprint([[1, 2], [3]]) != fingerprint([[1], [2, 3]])
    assert fingerprint([[1, 2]]) != fingerprint([[2, 1]])
    box = (slice(0.0, 1.5, 0.5), slice(2, 3, 1))
    assert fingerprint([[box]]) == fingerprint([[(slice(0.0, 1.5, 0.5), slice(2, 3, 1))]])
    assert fingerprint([[box]]) != fingerprint([[(slice(0.0, 1.5000001, 0.5), slice(2, 3, 1))]])


def test_torchs_own_batches_are_nothing_but_the_samplers_indices():
    plain = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
    assert list(Chunks(4)(plain.sampler)) == list(plain)
    assert list(Chunks(2, batched=True)(plain)) == [list(range(8)), [8, 9]]
