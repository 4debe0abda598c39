"""What ranks report of their steps, and the steps that every rank has reported.

A rank reports its measurements with the messages of a later step, and some ranks later than others.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.planning.plan import Schedule


@dataclass(frozen=True)
class MemoryReports:
    """What each rank reports of its memory.

    Attributes:
        local_batches: (W,) samples of the rank's last step, computed in one piece; 0 where it reports no memory.
        peaks: (W,) most bytes held in that step; 0 where they are not known.
        resting: (W,) bytes held before the first step.
        fits: (W,) the largest local batch that is known to fit since the rank ran out of memory; 0 if it never did.
        fails: (W,) the smallest one that is known not to fit; 0 for none, and then nothing above `fits` is tried.
    """

    local_batches: NDArray[np.float64]
    peaks: NDArray[np.float64]
    resting: NDArray[np.float64]
    fits: NDArray[np.float64]
    fails: NDArray[np.float64]


@dataclass(frozen=True)
class StepReports:
    """What all ranks report with the messages of a step.

    Attributes:
        step: of the messages.
        last_drawn: the last step that any rank's loaders have handed out.
        measured_steps: (W,) the step that each rank's measurement belongs to, a full global batch; -1 for none.
        compute_seconds: (W,) seconds of compute time in that step.
        sync_seconds: (W,) seconds from the rank's last local gradient to the averaged ones; 0 for unknown.
        averaged_after_backward: (W,) whether nothing was averaged during the backward pass.
        memory: see there.
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
    """A step of a full global batch that every rank has reported, with W values of what `StepReports` has.

    Attributes:
        local_batches: W samples, the split that the step ran with.
        averaged_after_backward: whether nothing was averaged during the backward pass of some rank.
    """

    step: int
    local_batches: tuple[int, ...]
    compute_seconds: tuple[float, ...]
    sync_seconds: tuple[float, ...]
    averaged_after_backward: bool = False


class MeasurementJoin:
    """Joins the ranks' measurements by step: a step is complete once all ranks have reported it."""

    PATIENCE = 64
    """Steps after which a measurement that not all ranks have reported is given up. Ranks are at most a few steps
    behind each other: this only bounds memory."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._reported: dict[int, dict[int, tuple[float, float, bool]]] = {}  # by step and rank

    def add(self, reports: StepReports, schedule: Schedule) -> tuple[MeasuredStep, ...]:
        """Take in what all ranks report; returns the steps that are complete now, which ran with these plans."""
        columns = (reports.compute_seconds, reports.sync_seconds, reports.averaged_after_backward)  # (W,) each
        steps = reports.measured_steps.tolist()
        measurements = zip(*(column.tolist() for column in columns), strict=True)
        for rank, (step, measurement) in enumerate(zip(steps, measurements, strict=True)):
            if step >= 0:
                self._reported.setdefault(step, {})[rank] = measurement
        complete = [step for step, ranks in self._reported.items() if len(ranks) == self._world_size]
        joined = []
        for step in complete:
            ranks = self._reported.pop(step)
            compute, sync, after_backward = zip(*(ranks[rank] for rank in range(self._world_size)), strict=True)
            joined.append(MeasuredStep(step, schedule.at(step).local_batches, compute, sync, any(after_backward)))
        oldest = max(steps) - self.PATIENCE
        self._reported = {step: ranks for step, ranks in self._reported.items() if step >= oldest}
        return tuple(joined)
