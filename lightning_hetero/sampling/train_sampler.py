"""The slice of the global stream that one rank computes, by the plan in force at each step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Sampler

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.plan import Schedule
from lightning_hetero.sampling.global_batches import GlobalBatches, Index


def split(size: int, local_batches: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """How many of `size` samples each rank gets when a full global batch is split into `local_batches`.

    A batch as large as the plan is split as planned. Another size is split in proportion, with at least `minimum`
    samples a rank; if there are not enough for that, the ranks with the largest shares get them, at least
    `minimum` each as far as possible, and the others get none.

    Args:
        size: samples at hand, at least 1.
        local_batches: the plan, W numbers.
        minimum: the least that a rank can compute with.

    Returns:
        W numbers that add up to `size`.
    """
    if size == sum(local_batches):
        return tuple(local_batches)
    world_size = len(local_batches)
    if size >= world_size * minimum:
        return proportional(size, local_batches, minimum=minimum)
    ranks = max(1, size // minimum)
    chosen = sorted(sorted(range(world_size), key=lambda rank: (-local_batches[rank], rank))[:ranks])
    counts = proportional(size, [local_batches[rank] for rank in chosen], minimum=min(minimum, size))
    result = [0] * world_size
    for rank, count in zip(chosen, counts, strict=True):
        result[rank] = count
    return tuple(result)


@dataclass(frozen=True)
class Share:
    """What one rank computes of one global batch.

    Args:
        step: which global batch, counted from 0 over the whole run.
        counts: W numbers, the samples of each rank; 0 for a rank that borrows.
        borrowed: this rank has no sample of its own in this step and computes some of the others' with weight 0.
        checksum: the plan's, see `Plan.checksum`.
    """

    step: int
    counts: tuple[int, ...]
    borrowed: bool
    checksum: int


def cut(indices: Sequence[Index], counts: Sequence[int], rank: int, minimum: int = 1) -> list[Index]:
    """The samples of a global batch that `rank` computes: its own slice, or borrowed ones from the front."""
    if counts[rank] == 0:
        return list(indices[: min(minimum, len(indices))])
    start = sum(counts[:rank])
    return list(indices[start : start + counts[rank]])


@dataclass(frozen=True)
class Position:
    """Where training stands: the epoch, and how many global batches have been started since the run began."""

    epoch: int
    step: int


class EpochPasses:
    """Which pass over a stream comes next, and at which step it begins.

    Args:
        stream: the loader's global batches.
        position: where training stands now.
    """

    def __init__(self, stream: GlobalBatches, position: Callable[[], Position]) -> None:
        self.stream = stream
        self._position = position
        self._key: tuple[int, int] | None = None  # epoch and repeat
        self._base = 0
        self._end: int | None = None  # the step after the pass, once it was read to its end

    def open(self) -> int:
        """Draw the pass that comes next; nothing happens when it was drawn already but nothing of it was used.

        Returns:
            The step of its first global batch.
        """
        position = self._position()
        if self._key is None or self._key[0] != position.epoch:
            self._key, self._base = (position.epoch, 0), position.step
        elif position.step > self._base:
            # A loader that is cycled within the epoch goes on where its last pass ended.
            self._key = (position.epoch, self._key[1] + 1)
            self._base = position.step if self._end is None else self._end
        self._end = None
        self.stream.draw(*self._key)
        return self._base

    def numbered(self, base: int) -> Iterator[tuple[int, list[Index]]]:
        """The global batches of the pass that was opened, each with its step, the first being `base`."""
        step = base
        for indices in self.stream.batches(lambda: self._position().step == base):
            yield step, indices
            step += 1
        self._end = step

    def __len__(self) -> int:
        """Global batches of the newest pass."""
        if self._key is None and not self.stream.endless:
            self.open()
        return len(self.stream)


class PendingShares:
    """The shares that a loader has been given but that were not trained on yet."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._shares: dict[int, Share] = {}
        self.drawn = -1
        """The last step that was handed out in this pass; plans up to it can't change any more."""
        self._over = False

    def begin(self, base: int) -> None:
        """A pass begins at step `base`; what an abandoned one has handed out from there on is void."""
        for void in [step for step in self._shares if step >= base]:
            del self._shares[void]
        self._over = False

    def end(self) -> None:
        """The pass has nothing more to hand out."""
        self._over = True

    def exhausted(self, step: int) -> bool:
        """Whether the pass had come to its end before `step`; other loaders may still go on."""
        return self._over and step > self.drawn

    def add(self, share: Share) -> None:
        """A share goes to the loader."""
        self._shares[share.step] = share
        self.drawn = share.step

    def take(self, step: int) -> Share:
        """The share that this rank computes at `step`; earlier ones are forgotten.

        Raises:
            RuntimeError: no share was handed out for that step.
        """
        share = self._shares.get(step)
        if share is None:
            raise RuntimeError(
                f"rank {self._rank} trains on global batch {step}, but its loader has handed out "
                f"{sorted(self._shares) or 'none'}: a batch was skipped or fetched behind the strategy's back"
            )
        for old in [known for known in self._shares if known < step]:
            del self._shares[old]
        return share


class LocalBatchSampler(Sampler[list[Index]]):
    """The batch sampler of one rank in training: its share of each global batch, by the plan at that step.

    Args:
        drawing: of the loader's global batches.
        schedule: the plans.
        rank: whose shares.
        minimum: the least that a rank can compute with.
        on_borrow: called just before a borrowed share is handed out.
    """

    def __init__(
        self,
        drawing: EpochPasses,
        schedule: Schedule,
        rank: int,
        *,
        minimum: int,
        on_borrow: Callable[[], None] = lambda: None,
    ) -> None:
        self._drawing = drawing
        self._schedule = schedule
        self._rank = rank
        self._minimum = minimum
        self._on_borrow = on_borrow
        self.pending_shares = PendingShares(rank)

    def __iter__(self) -> Iterator[list[Index]]:
        base = self._drawing.open()
        self.pending_shares.begin(base)
        return self._slices(self._drawing.numbered(base))

    def _slices(self, batches: Iterator[tuple[int, list[Index]]]) -> Iterator[list[Index]]:
        for step, indices in batches:
            plan = self._schedule.at(step)
            counts = split(len(indices), plan.local_batches, self._minimum)
            share = Share(step, counts, counts[self._rank] == 0, plan.checksum)
            self.pending_shares.add(share)
            if share.borrowed:
                self._on_borrow()
            yield cut(indices, counts, self._rank, self._minimum)
        self.pending_shares.end()

    def __len__(self) -> int:
        return len(self._drawing)


class LocalBatchSizeSampler(Sampler[list[None]]):
    """The batch sampler of one rank for an iterable data set: only how many samples to take, without an end.

    An iterable data set can't be sliced: each rank has its own stream, and its local batch follows the plan.

    Args:
        schedule: the plans.
        rank: whose local batches.
        global_batch: samples of a full step over all ranks.
        minimum: the least that a rank can compute with.
        position: where training stands now.
    """

    def __init__(
        self, schedule: Schedule, rank: int, *, global_batch: int, minimum: int, position: Callable[[], Position]
    ) -> None:
        self._schedule = schedule
        self._rank = rank
        self._global_batch = global_batch
        self._minimum = minimum
        self._position = position
        self.pending_shares = PendingShares(rank)

    def __iter__(self) -> Iterator[list[None]]:
        step = self._position().step
        while True:
            plan = self._schedule.at(step)
            counts = split(self._global_batch, plan.local_batches, self._minimum)
            self.pending_shares.add(Share(step, counts, borrowed=False, checksum=plan.checksum))
            yield [None] * counts[self._rank]
            step += 1
