"""What ranks tell each other at every step, and the weight of a rank's loss that follows from it."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt

TRAINS, LEFT_EPOCH, FETCHES = 0, 1, 2
"""What a rank is about to do when it sends its message."""

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepMessage:
    """One rank's row in the exchange of a step; all numbers, so that it travels in one tensor.

    Args:
        kind: `TRAINS`, `LEFT_EPOCH`, or `FETCHES` where ranks tell what they have measured before they fetch a batch.
        step: the global batch that the rank is at.
        count: its loss count; not known to the host on CUDA, where 1 stands for it.
        checksum: of the split in force.
        drawn: the last step that its loaders have handed out.
        measured: the step that `seconds` belongs to; -1 for none.
        seconds: its own work in that step.
        averaging: seconds between its last gradient and the averaged ones in that step.
        apart: 1 where gradients were averaged after the backward pass in that step, and not during it.
        memory: most bytes that the rank held in its last step; 0 if not known.
        content: a hash of the data of the first batches, where the user shards; 0 otherwise.
        stop: 1 when the rank has been asked to stop.
        held: its local batch in its last step, computed in one piece; 0 where it was not.
        resting: bytes that it held before its first step.
        fits: the largest local batch that is known to fit, learnt from running out of memory; 0 if it never did.
        fails: the smallest one that is known not to; 0 if it never ran out of memory.
    """

    kind: float
    step: float
    count: float = 1.0
    checksum: float = 0.0
    drawn: float = -1.0
    measured: float = -1.0
    seconds: float = 0.0
    averaging: float = 0.0
    apart: float = 0.0
    memory: float = 0.0
    content: float = 0.0
    stop: float = 0.0
    held: float = 0.0
    resting: float = 0.0
    fits: float = 0.0
    fails: float = 0.0

    def row(self) -> tuple[float, ...]:
        """The numbers, in the order of the fields."""
        return tuple(map(float, astuple(self)))


COLUMNS = tuple(field.name for field in fields(StepMessage))


def column(rows: Rows, name: str) -> npt.NDArray[np.float64]:
    """One field of all ranks' messages, (W,)."""
    values: npt.NDArray[np.float64] = rows[:, COLUMNS.index(name)]
    return values


def check(rows: Rows) -> None:
    """See that all ranks are at the same place with the same plan, and have counts that can be weighted.

    Raises:
        RuntimeError: a rank left the epoch or skipped a batch by itself, or its split is another one.
        ValueError: a loss count is negative or not finite.
    """
    kinds, steps = column(rows, "kind"), column(rows, "step")
    if len(set(kinds)) > 1 or len(set(steps)) > 1:
        places = "; ".join(_place(rank, *pair) for rank, pair in enumerate(zip(kinds, steps, strict=True)))
        raise RuntimeError(
            f"the ranks went different ways: {places}. Every rank has to train on every global batch: let "
            "on_train_batch_start, the loader and should_stop decide alike on all ranks."
        )
    if len(set(column(rows, "checksum"))) > 1:
        raise RuntimeError(f"the ranks split global batch {int(steps[0])} differently; this is a fault of the plan")
    counts = column(rows, "count")
    wrong = [rank for rank, count in enumerate(counts) if not np.isfinite(count) or count < 0]
    if wrong:
        listed = ", ".join(f"{counts[rank]:g} on rank {rank}" for rank in wrong)
        raise ValueError(
            f"the loss count of global batch {int(steps[0])} is {listed}; it has to be finite and at least 0"
        )


def _place(rank: int, kind: float, step: float) -> str:
    if kind == LEFT_EPOCH:
        return f"rank {rank} left the epoch after global batch {int(step) - 1}"
    if kind == FETCHES:
        return f"rank {rank} fetches global batch {int(step)}"
    return f"rank {rank} trains on global batch {int(step)}"


def weight(counts: Sequence[float] | npt.NDArray[np.float64], rank: int) -> float:
    """The factor on the loss of `rank` that turns DDP's plain mean into the count-weighted mean.

    `w_r = W * c_r / sum(c)`: the mean over ranks of `w_r` times the gradient of rank r's mean loss is the gradient of
    the mean over all of the global batch. 0 where nothing counts on any rank.

    Args:
        counts: W loss counts, finite and at least 0.
        rank: whose weight.
    """
    total = float(sum(counts))
    return len(counts) * float(counts[rank]) / total if total > 0 else 0.0
