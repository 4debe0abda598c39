"""All that the ranks' `DistributedSampler`s draw together, as one sampler."""

import copy
from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler


class OneReplica(Sampler[int]):
    """Draws what a user's `DistributedSampler` would draw with `num_replicas=1`: each sample once, without padding.

    Seed, epoch, order and data set are those that the user's sampler has when a pass begins.
    """

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = sampler

    @classmethod
    def of(cls, sampler: object, world_size: int) -> "OneReplica | None":
        """For a `DistributedSampler` over `world_size` ranks that draws as torch's does; None for any other sampler."""
        if (
            isinstance(sampler, DistributedSampler)
            and sampler.num_replicas == world_size > 1
            and type(sampler).__iter__ is DistributedSampler.__iter__
            and type(sampler).__len__ is DistributedSampler.__len__
        ):
            return cls(sampler)
        return None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the user's sampler."""
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        whole = copy.copy(self._sampler)
        whole.num_replicas, whole.rank = 1, 0
        whole.num_samples = whole.total_size = len(self)
        return iter(whole)

    def __len__(self) -> int:
        return len(cast("Sized", self._sampler.dataset))
