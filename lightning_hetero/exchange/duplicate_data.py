"""Do ranks train on the same data, where the strategy does not split it?"""

import hashlib
from typing import Any

import numpy as np
import torch

from lightning_hetero.exchange.messages import Rows, column

_NUMBERS = 65536
"""As many of a tensor's numbers are hashed: some patches' worth, which takes well under a millisecond."""


def content_hash(batch: Any) -> str | None:
    """A hash of the numbers and texts in a batch on the CPU; equal batches have equal hashes on every rank.

    None where there are none: what is in other objects can't be compared.
    """
    digest, known = hashlib.blake2b(digest_size=6), False
    for leaf in torch.utils._pytree.tree_leaves(batch):  # noqa: SLF001 - there is no public one
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().flatten()[:_NUMBERS].contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            digest.update(leaf.reshape(-1)[:_NUMBERS].tobytes())
        elif isinstance(leaf, int | float | str | bytes):
            digest.update(repr(leaf).encode())
        else:
            continue
        known = True
    return digest.hexdigest() if known else None


def hash_number(*hashes: str) -> float:
    """A number above 0 that stands for all of the hashes, exact as a float."""
    digest = hashlib.blake2b("/".join(hashes).encode(), digest_size=6).digest()
    return float(int.from_bytes(digest, "big") + 1)


class DuplicateDataCheck:
    """Finds out whether all ranks train on the same data where the strategy does not split it.

    It is for one fit, and looks at the first batches only.
    """

    WATCHED = 3
    """So many batches in a row are the same by chance only where they hold no information, such as nothing but 0."""

    def __init__(self) -> None:
        self._same = 0

    def look(self, rows: Rows, last: float, remedy: str) -> None:
        """Compare the data of a step.

        Args:
            rows: all ranks' messages, (W, columns); their content is 0 where there is nothing to compare.
            last: steps in the epoch.
            remedy: what the sentence says should be done.

        Raises:
            ValueError: the data of all first steps was the same on all ranks.
        """
        contents = column(rows, "content")  # (W,)
        if len(contents) == 1 or not contents.all():
            return
        self._same += len(set(contents)) == 1
        if self._same == min(self.WATCHED, last):
            raise ValueError(remedy)
