"""The weight of a rank's loss, which turns DDP's plain mean into the mean over all of the global batch."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def loss_weight(counts: Sequence[float] | npt.NDArray[np.float64], rank: int) -> float:
    """The factor on the loss of `rank` that turns DDP's plain mean into the count-weighted mean.

    `w_r = W * c_r / sum(c)`: the mean over ranks of `w_r` times the gradient of rank r's mean loss is the gradient of
    the mean over all of the global batch. 0 where nothing counts on any rank.

    Args:
        counts: W loss counts, finite and at least 0.
        rank: whose weight.
    """
    total = float(sum(counts))
    return len(counts) * float(counts[rank]) / total if total > 0 else 0.0
