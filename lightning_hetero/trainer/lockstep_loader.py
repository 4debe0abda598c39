"""An iterable data set's loader that ends on all ranks when it ends on one."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_hetero.exchange.duplicate_data import content_hash
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.trainer.counted_off import CountedOff

_CALL = "fetching a batch of an iterable data set"


class LockstepLoader:
    """An iterable data set's loader that ends on all ranks when it ends on one.

    It loads one batch ahead: while a batch is trained on, ranks exchange whether all of them have the next one. The
    group is for this loader only, so that its exchanges need no order relative to others.

    Args:
        loader: with local batches for this rank.
        group: of all ranks.
        whole: reads the user's batches instead, if they are the same on all ranks.
        whole_sentence: told then.
    """

    def __init__(self, loader: DataLoader[Any], group: RankGroup, whole: CountedOff, whole_sentence: str) -> None:
        vars(self).update(_loader=loader, _group=group, _whole=whole, _sentence=whole_sentence)
        vars(self).update(_compared=False, _counts_off=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets `worker_init_fn` to seed workers, and `_iterator` when it has shut them down.
        setattr(self._loader, name, value)

    def __iter__(self) -> Iterator[Any]:
        if self._counts_off:
            yield from self._whole
            return
        iterator = iter(self._loader)
        end = object()
        ahead = next(iterator, end)
        compares = not self._compared and ahead is not end
        # One row per rank: whether it has a batch, and a hash of its first sample.
        ready = self._group.start([ahead is not end, _first_sample_hash(ahead) if compares else 0.0], _CALL)
        rows = ready.wait()  # (W, 2)
        vars(self)["_compared"] = True
        if self._alike(rows[:, 1].tolist()):
            vars(self)["_counts_off"] = self._whole.agrees(self._group)
            if self._counts_off:
                rank_zero_info(self._sentence)
                del iterator, ahead  # the user's own batches are read instead
                yield from self._whole
                return
            rank_zero_warn(
                f"the first sample of {type(self._loader.dataset).__name__} is the same on all ranks. An iterable data "
                "set can't be split by the strategy: let each rank iterate over samples of its own, by "
                "torch.distributed.get_rank(), or all ranks train on the same data"
            )
        while rows[:, 0].all():
            batch, ahead = ahead, next(iterator, end)
            ready = self._group.start([ahead is not end, 0.0], _CALL)
            yield batch
            rows = ready.wait()

    @staticmethod
    def _alike(first_samples: list[float]) -> bool:
        """Whether all ranks have the same first sample, by their hashes; 0 is not compared."""
        return len(first_samples) > 1 and bool(first_samples[0]) and len(set(first_samples)) == 1


def _first_sample_hash(batch: Any) -> float:
    """A hash of the first sample of a batch; 0 where nothing can be compared."""
    tree_map = torch.utils._pytree.tree_map  # noqa: SLF001 - there is no public one
    first = tree_map(lambda leaf: leaf[:1] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf, batch)
    return content_hash(first)
