"""All ranks of a job in one process, with loaders that draw ahead."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping
from lightning_hetero.sampling.position import EpochPasses, Position
from lightning_hetero.sampling.train_sampler import LocalBatchSampler, Share

SEED = 11


@dataclass
class Rank:
    """One rank: its sampler, a loader that prefetches, and the batches that it got."""

    sampler: LocalBatchSampler
    schedule: Schedule
    global_batches: GlobalBatches
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
    """All ranks in one process; they agree on indices through a list instead of a collective call."""

    def __init__(
        self, source: Any, grouping: Grouping, plan: Sequence[int], *, minimum: int = 1, ahead: Sequence[int] = ()
    ) -> None:
        self.epoch = self.step = 0
        self.agreed: list[list[list[Any]]] = []
        self.noise = random.Random(3)
        self.ranks = [
            self._rank(source, grouping, plan, rank, minimum, [*ahead, *[0] * 16][rank]) for rank in range(len(plan))
        ]

    def _rank(self, source: Any, grouping: Grouping, plan: Sequence[int], rank: int, minimum: int, ahead: int) -> Rank:
        draws = count()

        def agree(drawn: list[list[Any]], *, complete: bool) -> list[list[Any]]:
            if rank == 0:
                self.agreed.append(drawn)
            return self.agreed[next(draws)]

        batches = GlobalBatches(copy.deepcopy(source), grouping, SEED, agree)
        schedule = Schedule(Plan(0, tuple(plan)))
        passes = EpochPasses(batches, lambda: Position(self.epoch, self.step))
        sampler = LocalBatchSampler(passes, schedule, rank, minimum=minimum, loads_in_process=ahead == 0)
        return Rank(sampler, schedule, batches, ahead)

    def disturb(self) -> None:
        """Draw random numbers between two batches as dropout and augmentation do, differently many on every rank."""
        torch.rand(self.noise.randrange(4))
        np.random.rand(self.noise.randrange(4))
        for _ in range(self.noise.randrange(4)):
            random.random()

    @property
    def last_drawn(self) -> int:
        return max(rank.sampler.pending_shares.last_drawn for rank in self.ranks)

    def replan(self, local_batches: Sequence[int], later: int) -> None:
        first = max(self.last_drawn + 1, self.ranks[0].schedule.newest.first_step) + later
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
    """The samples that count, by step, in rank order; checks everything that must hold in a step."""
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
        for rank, (share, indices) in zip(job.ranks, parts, strict=True):
            assert (share.random_state is not None) == (share.borrowed and rank.ahead == 0)
            if share.borrowed:
                assert indices, "a rank that borrows still computes"
                assert indices == batch[: len(indices)]
        batches.append(batch)
    return batches


def single(source: Any, grouping: Grouping, epochs: int) -> list[list[Any]]:
    """The global batches that a single process trains on."""
    job = Job(source, grouping, [10**6])
    for _ in range(epochs):
        job.run()
    return steps(job)


@st.composite
def plans(draw: Any, world_size: int, global_batch: int, minimum: int = 1) -> tuple[int, ...]:
    """Any split with at least `minimum` a rank."""
    rest = global_batch - world_size * minimum
    bounds = sorted(draw(st.lists(st.integers(0, rest), min_size=world_size - 1, max_size=world_size - 1)))
    return tuple(b - a + minimum for a, b in zip([0, *bounds], [*bounds, rest], strict=True))
