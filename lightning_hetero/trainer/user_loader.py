"""What a user's DataLoader is made of, and a copy of it with another batch sampler."""

import copy
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

_USERS = "_lightning_hetero_users_loader"  # where a prepared loader keeps the one that it was made from


def replace_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A loader like `loader` in everything but its batch sampler; the user's own stays untouched.

    Its batches come in the order in which they were drawn, also with ``in_order=False``: they go by number.
    """
    clone = copy.copy(loader)
    clone.in_order = True
    # DataLoader forbids to set it after construction, and rebuilding one needs arguments that can only be guessed.
    object.__setattr__(clone, "batch_sampler", batch_sampler)
    clone._iterator = None  # noqa: SLF001 - guarded by a test
    vars(clone)[_USERS] = loader
    return clone


def users_loader(loader: object) -> object:
    """The user's loader behind one that was prepared; Lightning puts prepared ones into the user's CombinedLoader."""
    return getattr(loader, _USERS, loader)


def name_of(thing: object) -> str:
    """The name of its class, which errors call it by."""
    return type(thing).__name__


def has_plain_batches(loader: DataLoader[Any]) -> bool:
    """Whether batches are just the sampler's next `batch_size` indices, as torch makes them."""
    return type(loader.batch_sampler) is BatchSampler


def batch_size_of(loader: DataLoader[Any]) -> int | None:
    """Samples in one of the loader's own batches, where its batch sampler says so."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


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
