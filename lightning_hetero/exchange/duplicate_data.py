"""Do ranks train on the same data, where the user shards?"""

import hashlib
from typing import Any

import torch

from lightning_hetero.exchange.messages import Rows, column


def content_hash(batch: Any) -> str:
    """A hash of the numbers in a batch on the CPU; equal batches have equal hashes on every rank."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in torch.utils._pytree.tree_leaves(batch):  # noqa: SLF001 - there is no public one
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().flatten()[:65536].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class DuplicateDataCheck:
    """Finds out whether all ranks train on the same data where the user shards; looks at the first batches only."""

    WATCHED = 3

    def __init__(self) -> None:
        self._same = 0

    @staticmethod
    def number(*hashes: str | None) -> float:
        """A number above 0 that stands for the data, exact as a float."""
        text = "/".join(part for part in hashes if part)
        return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") + 1)

    def look(self, step: int, rows: Rows, last: float) -> None:
        """Compare the data of a step.

        Args:
            step: which.
            rows: all ranks' messages.
            last: steps in the epoch.

        Raises:
            ValueError: the data of all steps so far was the same on all ranks, and they were enough.
        """
        contents = column(rows, "content")
        if len(contents) == 1 or step >= self.WATCHED or contents[0] == 0:
            return
        self._same += len(set(contents)) == 1
        if self._same == min(self.WATCHED, last):
            raise ValueError(
                "all ranks draw the same patches; remove use_distributed_sampler=False (from the Trainer): the "
                "strategy then gives each rank its own share"
            )
