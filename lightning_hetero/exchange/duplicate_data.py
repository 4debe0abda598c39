"""Finds out whether all ranks train on the same data, where the strategy doesn't split it."""

import hashlib
from typing import Any

import numpy as np
import torch

from lightning_hetero.exchange.messages import StepMessages

USER_SHARDS = (
    "all ranks draw the same patches; remove use_distributed_sampler=False (from the Trainer): the strategy then gives "
    "each rank its own share"
)
NO_DATA_LOADER = (
    "all ranks train on the same data: the training data is an iterable that is no DataLoader, which the strategy "
    "can't split; give it as a DataLoader, or let the iterable of each rank yield other data than those of the others"
)
"""The errors where the user has chosen to shard, and where the training data can't be split."""

_CONTENT = 2**16
"""Numbers of each tensor that are hashed: enough to distinguish data, in well under a millisecond."""


def content_hash(batch: Any, index_hash: str = "") -> float:
    """A number above 0 that stands for a batch, exact as a float; equal for equal batches on all ranks.

    It is 0 where the batch holds nothing that is compared: no tensors, arrays, numbers or texts. `index_hash` is that
    of the indices that it was drawn by, where they are known.
    """
    digest = hashlib.blake2b(index_hash.encode(), digest_size=6)  # a float holds 53 bits exactly
    comparable = False
    for leaf in torch.utils._pytree.tree_leaves(batch):  # noqa: SLF001 - there is no public one
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().flatten()[:_CONTENT].contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            digest.update(leaf.reshape(-1)[:_CONTENT].tobytes())
        elif isinstance(leaf, int | float | str | bytes):
            digest.update(repr(leaf).encode())
        else:
            continue
        comparable = True
    return float(int.from_bytes(digest.digest(), "big") + 1) if comparable else 0.0


class DuplicateDataCheck:
    """Compares the first batches of all ranks in one fit."""

    WATCHED = 3
    """Steps that are compared: where there are few samples, one batch may be the same by chance."""

    def __init__(self) -> None:
        self._duplicates = 0

    def check(self, messages: StepMessages, steps_in_epoch: float, sentence: str) -> None:
        """Compare the batches of a step.

        Args:
            messages: of all ranks; hashes of 0 are not compared, and those of all later steps are 0.
            steps_in_epoch: where they are fewer than `WATCHED`, they are enough; infinity where not known.
            sentence: of the error.

        Raises:
            ValueError: the batches of all steps so far were the same on all ranks, and they were enough.
        """
        hashes = messages.column("content_hash")  # (W,)
        if len(hashes) == 1 or not hashes.all():
            return
        self._duplicates += len(set(hashes)) == 1
        if self._duplicates == min(self.WATCHED, steps_in_epoch):
            raise ValueError(sentence)
