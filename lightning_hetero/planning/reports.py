"""What all ranks report with the messages of a step, and what is known of a step that all of them have measured."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MemoryReports:
    """What all ranks report of their memory, one array a field, each (W,).

    Attributes:
        local_batches: of each rank's last step; 0 where it says nothing of memory.
        peaks: most bytes held in that step; 0 where they are not known.
        resting: bytes held before the first step.
        fits: the largest local batch that is known to fit, from running out of memory; 0 if that never happened.
        fails: the smallest one that is known not to; 0 for none.
    """

    local_batches: NDArray[np.float64]
    peaks: NDArray[np.float64]
    resting: NDArray[np.float64]
    fits: NDArray[np.float64]
    fails: NDArray[np.float64]


@dataclass(frozen=True)
class StepReports:
    """What all W ranks report with the messages of one step.

    Attributes:
        step: that the messages belong to.
        last_drawn: the last step that any rank's loaders have handed out.
        measured_steps: the step that each rank's measurement belongs to, -1 for none, (W,).
        compute_seconds: (W,)
        sync_seconds: from each rank's last local gradient to the averaged ones, 0 for unknown, (W,).
        averaged_after_backward: whether gradients were averaged after the backward pass, (W,).
        memory: what they report of their memory.
    """

    step: int
    last_drawn: int
    measured_steps: NDArray[np.int64]
    compute_seconds: NDArray[np.float64]
    sync_seconds: NDArray[np.float64]
    averaged_after_backward: NDArray[np.bool_]
    memory: MemoryReports


@dataclass(frozen=True)
class MeasuredStep:
    """A step that every rank has reported."""

    step: int
    local_batches: tuple[int, ...]
    compute_seconds: tuple[float, ...]
    sync_seconds: tuple[float, ...]
    averaged_after_backward: bool
