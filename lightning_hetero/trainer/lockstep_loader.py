"""An iterable data set's loader that ends on all ranks when it ends on one."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_hetero.exchange.duplicate_data import content_hash
from lightning_hetero.exchange.groups import RankGroup

_CALL = "fetching a batch of an iterable data set"


class LockstepLoader:
    """An iterable data set's loader that ends on all ranks when it ends on one.

    It loads one batch ahead: while a batch is trained on, ranks exchange whether all of them have the next one. The
    group is for this loader only, so that its exchanges need no order relative to others.
    """

    def __init__(self, loader: DataLoader[Any], group: RankGroup) -> None:
        vars(self).update(_loader=loader, _group=group, _compared=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets `worker_init_fn` to seed workers, and `_iterator` when it has shut them down.
        setattr(self._loader, name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        end = object()
        ahead = next(iterator, end)
        compares = not self._compared and ahead is not end
        # One row per rank: whether it has a batch, and a hash of its first sample.
        ready = self._group.start([ahead is not end, _first_sample_hash(ahead) if compares else 0.0], _CALL)
        rows = ready.wait()  # (W, 2)
        vars(self)["_compared"] = True
        self._compare(rows[:, 1].tolist())
        while rows[:, 0].all():
            batch, ahead = ahead, next(iterator, end)
            ready = self._group.start([ahead is not end, 0.0], _CALL)
            yield batch
            rows = ready.wait()

    def _compare(self, first_samples: list[float]) -> None:
        if len(first_samples) > 1 and first_samples[0] and len(set(first_samples)) == 1:
            rank_zero_warn(
                f"the first sample of {type(self._loader.dataset).__name__} is the same on all ranks. An iterable data "
                "set can't be split by the strategy: let each rank iterate over samples of its own, by "
                "torch.distributed.get_rank(), or all ranks train on the same data"
            )


def _first_sample_hash(batch: Any) -> float:
    """A hash of the first sample of a batch; 0 where nothing can be compared."""
    tree_map = torch.utils._pytree.tree_map  # noqa: SLF001 - there is no public one
    first = tree_map(lambda leaf: leaf[:1] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf, batch)
    return content_hash(first)
