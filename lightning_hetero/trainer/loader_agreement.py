"""What ranks agree on about a loader: that it is the same on all of them, and which indices it draws."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.exchange.consistency import require
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping, Index, index_hash
from lightning_hetero.trainer.user_loader import name_of


@dataclass
class _IndexAgreement:
    """Makes all ranks use the same indices of a sampler; see `AgreeOnIndices`."""

    group: RankGroup
    sampler: str
    warned: bool = False

    def __call__(self, batches: list[list[Index]], *, complete: bool) -> list[list[Index]]:
        if self.group.world_size == 1 or len(set(self.group.gather(index_hash(batches)))) == 1:
            return batches
        if not complete:
            raise ValueError(
                f"{self.sampler} has no length and draws other indices on every rank: give it a length, or let it "
                "take its randomness from torch's, numpy's or Python's global generators"
            )
        if not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{self.sampler} draws other indices on every rank, so those of rank 0 are used on all of them. If it "
                "shards the data by rank itself, set Trainer(use_distributed_sampler=False); else let it take its "
                "randomness from torch's, numpy's or Python's global generators, or give it a generator= with a seed "
                "if it takes one, and runs can be repeated"
            )
        return self.group.broadcast(batches)


def agreed_batches(group: RankGroup, sampler: Any, grouping: Grouping, seed: int) -> GlobalBatches:
    """The global batches of a user's sampler or batch sampler, the same on all ranks.

    Raises:
        ValueError: it has nothing to draw from.
    """
    _require_tiles(sampler)
    return GlobalBatches(sampler, grouping, seed, _IndexAgreement(group, name_of(sampler)))


def require_same_loader(
    group: RankGroup, loader: DataLoader[Any], topic: str, *, global_batch: int | None = None
) -> None:
    """Compare a loader over all ranks.

    Raises:
        ValueError: it differs; the same sentence on every rank.
    """
    facts = {
        "data set": name_of(loader.dataset),
        "length of the data set": None if isinstance(loader.dataset, IterableDataset) else _length(loader.dataset),
        "batch size": loader.batch_size,
        "batch sampler": name_of(loader.batch_sampler),
        "global batch": global_batch,
    }
    require(group, facts, topic)


def _length(dataset: Any) -> int | None:
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
    inner = getattr(space, "series", None)  # where centres of patches may lie, from 0.10 on
    if (isinstance(areas, torch.Tensor) and not areas.numel()) or (inner is not None and bool(inner.is_empty.all())):
        height, width = getattr(space, "size", (math.nan, math.nan))
        raise ValueError(
            f"no tile is as large as the patches of {name_of(space)}, {height:g} × {width:g} in units of the data "
            "set's CRS: choose a smaller patch_size"
        )
