"""Prepares the training loaders, and looks up this rank's share of each step."""
# ruff: noqa: SLF001 - a test guards the Trainer's private names used here

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.exchange.duplicate_data import DuplicateDataCheck, content_hash
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping, index_hash
from lightning_hetero.sampling.position import EpochPasses, Position
from lightning_hetero.sampling.train_sampler import LocalBatchSampler, LocalBatchSizeSampler, PendingShares, Share
from lightning_hetero.trainer.counted_off import CountedOff, counted_off_sentence
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.lockstep_loader import LockstepLoader
from lightning_hetero.trainer.user_loader import (
    agreed_batches,
    batch_size_of,
    count_samples,
    has_plain_batches,
    length_of,
    name_of,
    replace_batch_sampler,
    require_same_loader,
)


def epoch_of(trainer: "pl.Trainer") -> int:
    """The current epoch, or the next one.

    While a resumed run sets up its loaders, `Trainer.current_epoch` is still the epoch before.
    """
    epoch: int = cast("Any", trainer.fit_loop.epoch_progress.current).processed
    return epoch


class _HashingBatchSampler:
    """Wraps the user's batch sampler, and keeps a hash of each of the first batches, and how many samples they hold."""

    def __init__(self, batch_sampler: Any) -> None:
        self._batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)  # Lightning calls its set_epoch
        self.hashes: deque[str] = deque()
        self.samples: deque[int] = deque()  # of the batches that were loaded, if they are counted

    def __iter__(self) -> Iterator[Any]:
        self.hashes.clear()
        self.samples.clear()
        for number, batch in enumerate(self._batch_sampler):
            if number < DuplicateDataCheck.COMPARED_STEPS:
                self.hashes.append(index_hash([batch]))
            yield batch

    def __len__(self) -> int:
        return len(self._batch_sampler)


@dataclass
class _LoaderSet:
    """The training loaders that Lightning prepares in one go and combines."""

    key: object  # distinguishes them from those that were prepared before
    prepared: int = 0  # how many of them so far
    samplers: list[LocalBatchSampler | LocalBatchSizeSampler] = field(default_factory=list)  # that the strategy splits
    hashing: list[_HashingBatchSampler] = field(default_factory=list)  # of loaders that the user shards
    counted_off: list[CountedOff] = field(default_factory=list)  # of which ranks take whole batches


class TrainingLoaders:
    """The training loaders of one call of a Trainer.

    Args:
        trainer: the strategy's Trainer.
        job: of this process.
        seed: for all passes over samplers, shared by all ranks.
        planner_for: from a loader's global batch, and whether it is the first (or only) training loader, to the planner
            of its shares; all ranks call it together.
    """

    def __init__(
        self, trainer: "pl.Trainer", job: Job, seed: int, planner_for: Callable[[int, bool], SplitPlanner]
    ) -> None:
        self._trainer, self._job, self._group = trainer, job, job.group
        self._seed = seed
        self._planner_for = planner_for
        self.user_shards = not trainer._accelerator_connector.use_distributed_sampler
        """Whether the user shards the data, by `use_distributed_sampler=False`."""
        self._loaders = _LoaderSet(key=None)
        self._hashed = 0  # batches that were hashed
        self._warned_inexact = False

    def position(self) -> Position:
        """How far training has come."""
        return Position(epoch_of(self._trainer), self._job.batches.next_step())

    def prepare(self, loader: object) -> object:
        """A training loader as this rank reads it; called for every one, on all ranks alike."""
        # Lightning prepares all of them in one go. During that, neither its combined loader nor the position changes;
        # by the next time, one of them has.
        key = (id(self._trainer.fit_loop._combined_loader), self.position())
        if self._loaders.key != key:
            self._loaders = _LoaderSet(key)
        loaders = self._loaders
        loaders.prepared += 1
        if not isinstance(loader, DataLoader):
            return loader if self.user_shards or self._group.world_size == 1 else self._iterable(loader)
        if self.user_shards and loader.batch_sampler is not None:
            hashing = _HashingBatchSampler(loader.batch_sampler)
            loaders.hashing.append(hashing)
            return count_samples(replace_batch_sampler(loader, hashing), hashing.samples.append)
        if self.user_shards:
            return loader
        if loader.batch_sampler is None:
            raise ValueError(
                f"the training loader of {name_of(loader.dataset)} has batch_size=None and no batch sampler, so its "
                "samples can't be split over the ranks: give it a batch_size or a batch_sampler, or shard the data "
                "yourself with Trainer(use_distributed_sampler=False)"
            )
        global_batch = self._global_batch(loader)
        require_same_loader(self._group, loader, "the training data", global_batch=global_batch)
        if isinstance(loader.dataset, IterableDataset):
            return self._in_lockstep(loader, global_batch)
        return self._split(loader, global_batch)

    def _split(self, loader: DataLoader[Any], global_batch: int | None) -> object:
        number = len(self._loaders.samplers)
        batches = self._global_batches(loader, global_batch, number)
        batches.draw(self.position().epoch, 0)
        if batches.first_size == 0:
            raise ValueError(
                f"the training loader has no batches: {name_of(batches.sampler)} drew too few samples for a global "
                f"batch of {global_batch or 'at least one sample'}{' with drop_last' if loader.drop_last else ''}: let "
                "it draw more (TorchGeo's samplers have a length=), or choose a smaller batch_size"
            )
        planner = self._planner_for(global_batch or batches.first_size, number == 0)
        sampler = LocalBatchSampler(
            EpochPasses(batches, self.position),
            planner.schedule,
            self._group.rank,
            minimum=planner.minimum,
            # Workers get indices steps ahead, and Lightning loads one batch ahead where there is no length: restoring
            # the random state from then would undo the steps in between.
            loads_in_process=loader.num_workers == 0 and not batches.endless,
        )
        self._loaders.samplers.append(sampler)
        return count_samples(replace_batch_sampler(loader, sampler), sampler.pending_shares.loaded)

    def _iterable(self, users: Any) -> object:
        """An iterable that is no DataLoader: its batches are counted off, unless ranks have different ones."""
        loader = CountedOff(users, self._group, self._seed + self._loaders.prepared, self.position)
        if not loader.agrees(self._group):
            return loader.left_alone()
        self._loaders.counted_off.append(loader)
        rank_zero_info(counted_off_sentence(f"{name_of(users)} is no DataLoader", self._group.world_size))
        return loader

    def _in_lockstep(self, loader: DataLoader[Any], global_batch: int | None) -> object:
        assert global_batch is not None, "torch gives an iterable data set its own batch sampler, with a batch size"
        number, group = len(self._loaders.samplers), self._group
        sentence = counted_off_sentence(f"{name_of(loader.dataset)} is iterable", group.world_size)
        pending = PendingShares(group.rank)
        users = replace_batch_sampler(loader, loader.batch_sampler)
        whole = CountedOff(users, group, self._seed + self._loaders.prepared, self.position, pending)
        # Lightning asks for a length before it reads the first batch; without one, the loader compares when it is read.
        if group.world_size > 1 and length_of(loader.dataset) is not None and whole.agrees(group):
            self._loaders.counted_off.append(whole)
            rank_zero_info(sentence)
            return whole
        planner = self._planner_for(global_batch, number == 0)
        sampler = LocalBatchSizeSampler(
            planner.schedule,
            group.rank,
            global_batch=global_batch,
            minimum=planner.minimum,
            position=self.position,
            pending_shares=pending,
        )
        self._loaders.samplers.append(sampler)
        counted = count_samples(replace_batch_sampler(loader, sampler), sampler.pending_shares.loaded)
        return LockstepLoader(counted, self._job.lockstep_group(number), whole, sentence)

    def _global_batch(self, loader: DataLoader[Any]) -> int | None:
        """Samples of a step; None where that is only known once the batch sampler has drawn."""
        own = batch_size_of(loader)
        given = self._job.options.global_batch
        if given is None:
            return own * self._group.world_size if own is not None else None
        if own is None:
            raise ValueError(
                f"global_batch={given} can't be made up of the batches of {name_of(loader.batch_sampler)}, which "
                "doesn't say how many samples it draws as one: give it an attribute batch_size"
            )
        if not has_plain_batches(loader) and given % own:
            raise ValueError(
                f"global_batch={given} is not a multiple of the {own} samples that {name_of(loader.batch_sampler)} "
                "draws as one batch"
            )
        return given

    def _global_batches(self, loader: DataLoader[Any], global_batch: int | None, number: int) -> GlobalBatches:
        source: Any = loader.batch_sampler
        if has_plain_batches(loader):
            assert global_batch is not None, "torch's own batch sampler has a batch size"
            grouping = Grouping(global_batch, drop_last=source.drop_last)
            source = source.sampler
        else:
            own = batch_size_of(loader)
            grouping = Grouping(global_batch // own if global_batch and own else self._group.world_size, batched=True)
        return agreed_batches(self._group, source, grouping, self._seed + number, loader)

    # ---- while training ----

    def begin_training(self) -> None:
        """The Trainer now knows its first epoch: draw indices again if they were drawn for another one.

        A resumed run sets its loaders up earlier, possibly before it has loaded its position from the checkpoint, and
        would otherwise train its first epoch on the indices that were drawn then.
        """
        fetcher = self._trainer.fit_loop._data_fetcher
        loaders = [*self._loaders.samplers, *self._loaders.counted_off]
        drawn = {loader.passes.epoch for loader in loaders if isinstance(loader, LocalBatchSampler | CountedOff)}
        if fetcher is not None and drawn - {None, self.position().epoch}:
            iter(fetcher)

    def take(self, step: int) -> tuple[Share | None, int | None]:
        """This rank's share of global batch `step`, and how many samples of its own its batch holds.

        They are those of the first loader that is split, and None where the user shards the data, or where the number
        is not known. A batch without samples of any of the loaders does not count.
        """
        if self._loaders.hashing:
            held = [hashing.samples.popleft() for hashing in self._loaders.hashing if hashing.samples]
            return None, (held[0] if all(held) else 0) if held else None
        pending = [loader.pending_shares for loader in (*self._loaders.samplers, *self._loaders.counted_off)]
        shares = [loader.take(step) for loader in pending if not loader.exhausted(step)]
        if len(shares) > 1 and not self._warned_inexact and not _proportional(shares):
            self._warned_inexact = True
            rank_zero_warn(
                "several training loaders whose batches can't be split in the same proportion: one weight serves for "
                "all of them, so the gradient is only nearly that of the global batch. Choose batch sizes that are "
                "multiples of each other."
            )
        if not shares:
            return None, None
        rank = self._group.rank
        samples = [share.samples(rank) for share in shares]
        kept = [held / max(1, share.counts[rank]) for held, share in zip(samples, shares, strict=True)]
        if len(set(kept)) > 1 and all(share.counts[rank] for share in shares) and not self._warned_inexact:
            self._warned_inexact = True
            warnings.warn(
                f"the collate functions of several training loaders leave out other numbers of samples on rank {rank}: "
                "one weight serves for all of them, so the gradient is only nearly that of the global batch",
                stacklevel=2,
            )
        return shares[0], samples[0] if all(samples) else 0

    @property
    def last_drawn(self) -> int:
        """The last step whose share any loader was given; -1 for none."""
        return max((sampler.pending_shares.last_drawn for sampler in self._loaders.samplers), default=-1)

    def content_hash(self, batch: Any) -> float:
        """A hash of one of the first batches, for ranks to compare (all of the batch, on the CPU).

        It is 0 for later batches, where nothing in the batch can be compared, and where the user does not shard.
        """
        if self._hashed >= DuplicateDataCheck.COMPARED_STEPS or not self.user_shards:
            return 0.0
        self._hashed += 1
        drawn = [sampler.hashes.popleft() for sampler in self._loaders.hashing if sampler.hashes]
        return content_hash(batch, "".join(drawn))


def _proportional(shares: list[Share]) -> bool:
    first = shares[0].counts
    return all(
        a * sum(first) == b * sum(share.counts) for share in shares for a, b in zip(share.counts, first, strict=True)
    )
