"""A user's DataLoader: what it contains, checks that ranks agree on it, and a copy with another batch sampler."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_hetero.exchange.consistency import require_equal
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.global_batches import (
    GlobalBatches,
    Grouping,
    Index,
    WorkerSeeds,
    index_hash,
    plain_index,
)
from lightning_hetero.sampling.one_replica import OneReplica
from lightning_hetero.sampling.sharded_draws import are_shards, declares_shard
from lightning_hetero.step.collating import CountingCollate, KeptBatches

USERS_LOADER = "_lightning_hetero_users_loader"
"""Attribute of what replaces a user's loader: the user's loader."""


def replace_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A loader like `loader` in everything but its batch sampler; the user's own stays untouched.

    Its batches come in the order in which they were drawn, even with ``in_order=False``: shares are matched by order.
    """
    clone = copy.copy(loader)
    clone.in_order = True
    # DataLoader forbids setting it after construction, and building a new one would need guessed arguments.
    object.__setattr__(clone, "batch_sampler", batch_sampler)
    clone._iterator = None  # noqa: SLF001 - guarded by a test
    vars(clone)[USERS_LOADER] = loader
    return clone


class _CountingLoader:
    """Mixed into a loader's class, whose batches then are those of `KeptBatches`."""

    def __iter__(self) -> Iterator[Any]:
        state: Any = vars(self)
        return KeptBatches(super().__iter__(), state["_record"], may_drop=state["collate_fn"].may_drop)  # type: ignore[misc] # the loader's


def count_samples(loader: DataLoader[Any], record: Callable[[int], None]) -> DataLoader[Any]:
    """A loader like `loader` that tells `record` how many samples each of its batches holds.

    A loader with torch's own collate function and a data set with indices always has as many as were drawn.
    """
    collate = CountingCollate(loader.collate_fn)
    if not collate.may_drop and not isinstance(loader.dataset, IterableDataset):
        return loader
    counting: DataLoader[Any] = object.__new__(type(name_of(loader), (_CountingLoader, type(loader)), {}))
    vars(counting).update(vars(loader), collate_fn=collate, _record=record)
    return counting


def users_loader(loader: object) -> object:
    """The user's loader that a loader was copied from; Lightning puts the copies into the user's CombinedLoader."""
    return getattr(loader, USERS_LOADER, loader)


def name_of(instance: object) -> str:
    """The name of its class, for errors."""
    return type(instance).__name__


def has_plain_batches(loader: DataLoader[Any]) -> bool:
    """Whether batches are the sampler's next `batch_size` indices, as torch makes them by default."""
    return type(loader.batch_sampler) is BatchSampler


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """Samples in one of the loader's own batches; None where its batch sampler does not say."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def without_shards(loader: DataLoader[Any], world_size: int) -> DataLoader[Any]:
    """A loader like `loader` without torch's `DistributedSampler`; `loader` itself if it has none.

    The strategy splits what it draws instead, so that shares hold, and nothing is drawn twice for padding.
    """
    batches: Any = loader.batch_sampler
    sampler = OneReplica.of(getattr(batches, "sampler", None), world_size)
    if sampler is None:
        return loader
    batches = copy.copy(batches)
    batches.sampler = sampler
    return replace_batch_sampler(loader, batches)


def lost_geographic_sampler(loader: DataLoader[Any]) -> bool:
    """Whether a geographic data set would be indexed with integers, which it can't be."""
    classes = type(loader.dataset).__mro__
    return (
        any(cls.__name__ == "GeoDataset" and cls.__module__.startswith("torchgeo.") for cls in classes)
        and isinstance(loader.batch_sampler, BatchSampler)
        and isinstance(loader.batch_sampler.sampler, SequentialSampler)
    )


@dataclass
class _IndexAgreement:
    """Makes all ranks use the same indices of a sampler; see `AgreeOnIndices`.

    `size` is the number of samples of a map-style data set, if it is known.
    """

    group: RankGroup
    sampler: Any
    size: int | None
    warned: bool = False

    def __call__(self, batches: list[list[Index]], *, complete: bool) -> list[list[Index]]:
        group = self.group
        if group.world_size == 1:
            return batches
        declares = declares_shard(self.sampler, group.rank, group.world_size)
        hashes, declared = zip(*group.gather((index_hash(batches), declares)), strict=True)
        if len(set(hashes)) == 1 and not all(declared):
            return batches
        if not self.warned:
            draws = group.gather([plain_index(index) for batch in batches for index in batch])
            if are_shards(draws, self.size, declared=all(declared)):
                raise ValueError(
                    f"{name_of(self.sampler)} draws another part of the data on each rank, so that the strategy would "
                    "use rank 0's part only: set Trainer(use_distributed_sampler=False) if it is to shard the data, or "
                    "let it draw all of the data on every rank (num_replicas=1, rank=0 if it takes them), which the "
                    "strategy then splits"
                )
        if len(set(hashes)) == 1:
            return batches
        if not complete:
            raise ValueError(
                f"{name_of(self.sampler)} has no length and draws other indices on every rank: give it a length, or "
                "let it take its randomness from torch's, numpy's or Python's global generators; if it shards the data "
                "by rank itself, set Trainer(use_distributed_sampler=False)"
            )
        if not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{name_of(self.sampler)} draws other indices on every rank, so those of rank 0 are used on all of "
                "them. If it shards the data by rank itself, set Trainer(use_distributed_sampler=False); else let it "
                "take its randomness from torch's, numpy's or Python's global generators, or give it a generator= with "
                "a seed if it takes one, and runs can be repeated"
            )
        return group.broadcast(batches)


def agreed_batches(
    group: RankGroup, sampler: Any, grouping: Grouping, seed: int, loader: DataLoader[Any]
) -> GlobalBatches:
    """The global batches of the sampler or batch sampler of a user's loader, the same on all ranks.

    When it is drawn, a ValueError says if it shards the data by rank itself.
    """
    _require_tiles(sampler)
    agree = _IndexAgreement(group, sampler, length_of(loader.dataset))
    seeds = WorkerSeeds(loader.generator, once=loader.persistent_workers)
    return GlobalBatches(sampler, grouping, seed, agree, seeds)


def require_same_loader(
    group: RankGroup, loader: DataLoader[Any], topic: str, *, global_batch: int | None = None
) -> None:
    """Raise the same ValueError on all ranks where their loaders differ."""
    facts = {
        "data set": name_of(loader.dataset),
        "length of the data set": None if isinstance(loader.dataset, IterableDataset) else length_of(loader.dataset),
        "batch size": loader.batch_size,
        "batch sampler": name_of(loader.batch_sampler),
        "global batch": global_batch,
    }
    require_equal(group, facts, topic)


def length_of(dataset: Any) -> int | None:
    """Samples in a data set; None if it does not say."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # it need not have one
        return None


def _require_tiles(sampler: object) -> None:
    """Raise where a random geographic sampler has no tiles to draw from; torch would speak of probabilities instead."""
    if not type(sampler).__module__.startswith("torchgeo."):
        return
    space = getattr(sampler, "spatial_sampler", sampler)
    areas = getattr(space, "areas", None)  # of tiles that are large enough
    inner = getattr(space, "series", None)  # where centers of patches may lie, from 0.10 on
    if (isinstance(areas, torch.Tensor) and not areas.numel()) or (inner is not None and bool(inner.is_empty.all())):
        height, width = getattr(space, "size", (math.nan, math.nan))
        raise ValueError(
            f"no tile is as large as the patches of {name_of(space)}, {height:g} × {width:g} in units of the data "
            "set's CRS: choose a smaller patch_size"
        )
