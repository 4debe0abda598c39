"""The part of each global batch that one rank computes, according to the plan in force at its step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from torch.utils.data import Sampler

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.plan import Schedule
from lightning_hetero.sampling.global_batches import Index
from lightning_hetero.sampling.position import EpochPasses, Position
from lightning_hetero.sampling.random_state import RandomState


def split(size: int, local_batches: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """How many of `size` samples (at least 1) each rank gets, given the split `local_batches` of a full global batch.

    A full batch is split as planned. Another size is split in proportion, with at least `minimum` samples per rank; if
    there are too few for that, the ranks with the largest shares get them, at least `minimum` each as far as possible,
    and the others get none.
    """
    if size == sum(local_batches):
        return tuple(local_batches)
    world_size = len(local_batches)
    if size >= world_size * minimum:
        return proportional(size, local_batches, minimum=minimum)
    ranks = max(1, size // minimum)
    chosen = sorted(sorted(range(world_size), key=lambda rank: (-local_batches[rank], rank))[:ranks])
    counts = proportional(size, [local_batches[rank] for rank in chosen], minimum=min(minimum, size))
    by_rank = dict(zip(chosen, counts, strict=True))
    return tuple(by_rank.get(rank, 0) for rank in range(world_size))


def local_indices(indices: Sequence[Index], counts: Sequence[int], rank: int, minimum: int = 1) -> list[Index]:
    """The samples of a global batch that a rank computes: its own, or if it has none, borrowed ones from the front."""
    if counts[rank] == 0:
        return list(indices[: min(minimum, len(indices))])
    start = sum(counts[:rank])
    return list(indices[start : start + counts[rank]])


@dataclass(frozen=True)
class Share:
    """What one rank computes of one global batch."""

    step: int  # which global batch, counted from 0 over the whole run
    counts: tuple[int, ...]  # W numbers of samples; 0 for a rank that borrows
    borrowed: bool  # this rank has no sample of its own in this step, and computes samples of other ranks with weight 0
    checksum: int  # of the plan
    random_state: RandomState | None = field(default=None, compare=False)
    """Of this process, just before a borrowed batch was loaded in it; None for any other share."""
    kept: int | None = field(default=None, compare=False)
    """How many of its samples this rank has in its batch, if its collate function has left some out; else None."""
    planned: bool = True
    """Whether it follows from a plan; otherwise whole batches are counted off."""

    def samples(self, rank: int) -> int:
        """Samples of its own that this rank, `rank`, has in its batch; 0 if it computes borrowed ones."""
        return self.counts[rank] if self.kept is None else self.kept


class PendingShares:
    """A rank's shares that its loader has been given, but that have not been trained on yet."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._shares: dict[int, Share] = {}
        self._next_loaded = 0
        self.last_drawn = -1
        """The last step whose share the loader has been given; up to this step, plans can no longer change."""
        self._complete = False

    def begin(self, first_step: int) -> None:
        """Start a pass at a step; drop the shares that an abandoned pass has drawn from that step on."""
        self._shares = {step: share for step, share in self._shares.items() if step < first_step}
        self._next_loaded = first_step
        self._complete = False

    def end(self) -> None:
        """Mark the pass as complete: it has no more shares."""
        self._complete = True

    def exhausted(self, step: int) -> bool:
        """Whether the pass ended before `step`; other loaders may still continue."""
        return self._complete and step > self.last_drawn

    def add(self, share: Share) -> None:
        """Record a share that is given to the loader."""
        self._shares[share.step] = share
        self.last_drawn = share.step

    def loaded(self, kept: int) -> None:
        """Record how many samples the next batch holds; the loader returns batches in the order of its shares."""
        step, self._next_loaded = self._next_loaded, self._next_loaded + 1
        share = self._shares[step]
        if kept != share.counts[self._rank] and not share.borrowed:
            self._shares[step] = replace(share, kept=kept)

    def take(self, step: int) -> Share:
        """The share that this rank computes at a step; the loader must have been given one for it.

        Earlier ones are dropped.
        """
        if step not in self._shares:
            raise RuntimeError(
                f"rank {self._rank} trains on global batch {step}, but its loader has drawn "
                f"{sorted(self._shares) or 'none'}: a batch was skipped or fetched behind the strategy's back"
            )
        self._shares = {known: share for known, share in self._shares.items() if known >= step}
        return self._shares[step]


class LocalBatchSampler(Sampler[list[Index]]):
    """The batch sampler of one rank in training: its share of each global batch, according to the plan at that step.

    Args:
        passes: the passes over the loader's global batches.
        schedule: the plans.
        rank: the rank whose shares are drawn.
        minimum: the fewest samples that a rank can compute with.
        loads_in_process: batches are loaded in this process (no workers), each not before its step begins. Then the
            random state before a borrowed batch is known.
    """

    def __init__(
        self,
        passes: EpochPasses[list[Index]],
        schedule: Schedule,
        rank: int,
        *,
        minimum: int,
        loads_in_process: bool = False,
    ) -> None:
        self.passes = passes
        self._schedule, self._rank, self._minimum = schedule, rank, minimum
        self._loads_in_process = loads_in_process
        self.pending_shares = PendingShares(rank)

    def __iter__(self) -> Iterator[list[Index]]:
        first_step = self.passes.begin()  # now: the returned generator only runs when its first batch is fetched
        self.pending_shares.begin(first_step)
        return self._local_batches(first_step)

    def _local_batches(self, first_step: int) -> Iterator[list[Index]]:
        for step, indices in self.passes.batches(first_step):
            plan = self._schedule.at(step)
            counts = split(len(indices), plan.local_batches, self._minimum)
            borrowed = counts[self._rank] == 0
            random_state = RandomState.current() if borrowed and self._loads_in_process else None
            self.pending_shares.add(Share(step, counts, borrowed, plan.checksum, random_state))
            yield local_indices(indices, counts, self._rank, self._minimum)
        self.pending_shares.end()

    def __len__(self) -> int:
        return len(self.passes)


class LocalBatchSizeSampler(Sampler[list[None]]):
    """The batch sampler of one rank for an iterable data set: it only gives the number of samples, and never ends.

    An iterable data set can't be split: each rank iterates over samples of its own, and its local batch follows the
    plan. Arguments are those of `LocalBatchSampler`, the samples of a full global batch, the position of training, and
    where the shares are recorded.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        *,
        global_batch: int,
        minimum: int,
        position: Callable[[], Position],
        pending_shares: PendingShares,
    ) -> None:
        self._schedule, self._rank, self._minimum = schedule, rank, minimum
        self._global_batch, self._position = global_batch, position
        self.pending_shares = pending_shares

    def __iter__(self) -> Iterator[list[None]]:
        first_step = self._position().step
        self.pending_shares.begin(first_step)
        for step in count(first_step):
            plan = self._schedule.at(step)
            counts = split(self._global_batch, plan.local_batches, self._minimum)
            self.pending_shares.add(Share(step, counts, borrowed=False, checksum=plan.checksum))
            yield [None] * counts[self._rank]
