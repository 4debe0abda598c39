"""Detects that all ranks train on the same data, where the user shards it."""

import hashlib
from typing import Any

import numpy as np
import torch

from lightning_hetero.exchange.messages import StepMessages

USER_SHARDS = (
    "all ranks draw the same patches; remove use_distributed_sampler=False (from the Trainer): the strategy then gives "
    "each rank its own share"
)
"""The error message."""

_HASHED = 2**16
"""Numbers of each tensor that are hashed. Chosen: enough to distinguish data, in well under a millisecond."""


def content_hash(batch: Any, index_hash: str = "") -> float:
    """A hash of a batch, above 0 and exact as a float; equal batches have equal hashes on all ranks.

    It is 0 if the batch contains nothing comparable: no tensors, arrays, numbers or strings. `index_hash` is that of
    the batch's indices, if they are known.
    """
    digest = hashlib.blake2b(index_hash.encode(), digest_size=6)  # a float holds 53 bits exactly
    comparable = False
    for leaf in torch.utils._pytree.tree_leaves(batch):  # noqa: SLF001 - there is no public function
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().flatten()[:_HASHED].contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            digest.update(leaf.reshape(-1)[:_HASHED].tobytes())
        elif isinstance(leaf, int | float | str | bytes):
            digest.update(repr(leaf).encode())
        else:
            continue
        comparable = True
    return float(int.from_bytes(digest.digest(), "big") + 1) if comparable else 0.0


class DuplicateDataCheck:
    """Compares the first batches of all ranks in a fit."""

    COMPARED_STEPS = 3
    """Steps that are compared. Chosen: with few samples, a single batch may be the same by chance."""

    def __init__(self) -> None:
        self._duplicates = 0

    def check(self, messages: StepMessages, steps_in_epoch: float) -> None:
        """Compare the batches of a step.

        Args:
            messages: of all ranks; a hash of 0 is not compared, and all hashes are 0 once enough steps were compared.
            steps_in_epoch: if fewer than `COMPARED_STEPS`, comparing these is enough; infinity if not known.

        Raises:
            ValueError: the batches of enough steps were the same on all ranks.
        """
        hashes = messages.column("content_hash")  # (W,)
        if len(hashes) == 1 or not hashes.all():
            return
        self._duplicates += len(set(hashes)) == 1
        if self._duplicates == min(self.COMPARED_STEPS, steps_in_epoch):
            raise ValueError(USER_SHARDS)
