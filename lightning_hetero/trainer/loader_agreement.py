"""What ranks agree on about a loader: that it is the same on all of them, and which indices it draws."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.exchange.consistency import require
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping, Index, index_hash
from lightning_hetero.trainer.user_loader import length_of, name_of, require_tiles


class IndexAgreement:
    """Makes all ranks use the same indices of one loader; see `AgreeOnIndices`.

    Args:
        group: of all ranks.
        sampler: its name, for what is said.
    """

    def __init__(self, group: RankGroup, sampler: str) -> None:
        self._group = group
        self._sampler = sampler
        self._warned = False

    def __call__(self, batches: list[list[Index]], *, complete: bool) -> list[list[Index]]:
        """The batches where they are the same everywhere, rank 0's otherwise.

        Raises:
            ValueError: they differ and are not complete, so that rank 0's can't be sent.
        """
        if self._group.world_size == 1 or len(set(self._group.gather(index_hash(batches)))) == 1:
            return batches
        if not complete:
            raise ValueError(
                f"{self._sampler} has no length and draws other indices on every rank: give it a length, or let it "
                "take its randomness from torch's, numpy's or Python's global generators"
            )
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._sampler} draws other indices on every rank, so those of rank 0 are used on all of them. If it "
                "shards the data by rank itself, set Trainer(use_distributed_sampler=False); else let it take its "
                "randomness from torch's, numpy's or Python's global generators, or give it a generator= with a seed "
                "if it takes one, and runs can be repeated"
            )
        return self._group.broadcast(batches)


def agreed_batches(group: RankGroup, sampler: Any, grouping: Grouping, seed: int) -> GlobalBatches:
    """The global batches of a user's sampler or batch sampler, the same on all ranks.

    Raises:
        ValueError: it has nothing to draw from.
    """
    require_tiles(sampler)
    return GlobalBatches(sampler, grouping, seed, IndexAgreement(group, name_of(sampler)))


def require_same_loader(
    group: RankGroup, loader: DataLoader[Any], topic: str, *, global_batch: int | None = None
) -> None:
    """Compare a loader over all ranks.

    Raises:
        ValueError: it differs; the same sentence on every rank.
    """
    iterable = isinstance(loader.dataset, IterableDataset)
    facts = {
        "data set": name_of(loader.dataset),
        "length of the data set": None if iterable else length_of(loader.dataset),
        "batch size": loader.batch_size,
        "batch sampler": name_of(loader.batch_sampler),
        "global batch": global_batch,
    }
    require(group, facts, topic)
