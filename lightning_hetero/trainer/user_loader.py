"""What a user's DataLoader is made of, and a copy of it with another batch sampler."""
# ruff: noqa: SLF001 - what is touched of a loader is guarded by tests

import copy
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_hetero.exchange.duplicate_data import DuplicateDataCheck
from lightning_hetero.sampling.global_batches import index_hash

_USERS = "_lightning_hetero_users_loader"  # where a prepared loader keeps the one that it was made from


def replace_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A loader like `loader` in everything but its batch sampler; the user's own stays untouched.

    Its batches come in the order in which they were drawn, also with ``in_order=False``: they go by number.
    """
    clone = copy.copy(loader)
    clone.in_order = True
    # DataLoader forbids to set it after construction, and rebuilding one needs arguments that can only be guessed.
    object.__setattr__(clone, "batch_sampler", batch_sampler)
    clone._iterator = None
    vars(clone)[_USERS] = loader
    return clone


def users_loader(loader: object) -> object:
    """The user's loader behind one that was prepared; Lightning puts prepared ones into the user's CombinedLoader."""
    return getattr(loader, _USERS, loader)


class HashingBatchSampler:
    """A batch sampler that passes on what the user's draws, and keeps a hash of each of the first batches."""

    def __init__(self, batch_sampler: Any) -> None:
        self._batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)  # Lightning calls its set_epoch
        self.hashes: deque[str] = deque()

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batch_sampler):
            if number < DuplicateDataCheck.WATCHED:
                self.hashes.append(index_hash([batch]))
            yield batch

    def __len__(self) -> int:
        return len(self._batch_sampler)


def name_of(thing: object) -> str:
    """What errors call it: the name of its class."""
    return type(thing).__name__


def has_plain_batches(loader: DataLoader[Any]) -> bool:
    """Whether batches are just the sampler's next `batch_size` indices, as torch makes them."""
    return type(loader.batch_sampler) is BatchSampler


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """Samples of one of the loader's own batches, where its batch sampler says so."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def length_of(dataset: object) -> int | None:
    """Samples of a data set, where it has a length."""
    try:
        return len(dataset)  # type: ignore[arg-type] # whatever has no length is none of our business
    except (TypeError, NotImplementedError):
        return None


def is_distributed(loader: DataLoader[Any]) -> bool:
    """Whether the user's own sampler gives each rank its part."""
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def lost_geographic_sampler(loader: DataLoader[Any]) -> bool:
    """Whether a geographic data set is to be indexed with plain numbers, which it can't be."""
    classes = type(loader.dataset).__mro__
    return (
        any(cls.__name__ == "GeoDataset" and cls.__module__.startswith("torchgeo.") for cls in classes)
        and isinstance(loader.batch_sampler, BatchSampler)
        and isinstance(loader.batch_sampler.sampler, SequentialSampler)
    )


def require_tiles(sampler: object) -> None:
    """See that a random geographic sampler has tiles to draw from; torch would speak of probabilities instead.

    Raises:
        ValueError: it has none.
    """
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
