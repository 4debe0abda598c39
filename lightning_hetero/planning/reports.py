"""What ranks report about their steps, and the steps that every rank has reported.

A rank reports its measurements with the message of a later step, some ranks later than others.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.planning.plan import Schedule


@dataclass(frozen=True)
class MemoryReports:
    """What each rank reports about its memory; all arrays are (W,)."""

    local_batches: NDArray[np.float64]  # samples of its last step, if computed in one piece; 0 for no report
    peaks: NDArray[np.float64]  # peak bytes held in that step; 0 for unknown
    resting: NDArray[np.float64]  # bytes held before the first step
    fits: NDArray[np.float64]  # largest local batch known to fit since it ran out of memory; 0 if it never did
    fails: NDArray[np.float64]  # smallest one known not to fit; 0 for none: then nothing above `fits` is tried


@dataclass(frozen=True)
class StepReports:
    """What all ranks report with the messages of a step; all arrays are (W,)."""

    step: int  # of the messages
    last_drawn: int  # the last step that the loaders of any rank have drawn
    measured_steps: NDArray[np.int64]  # the full step that each rank has measured; -1 for none
    compute_seconds: NDArray[np.float64]  # compute time in that step
    sync_seconds: NDArray[np.float64]  # from its last local gradient to the averaged ones; 0 for unknown
    averaged_after_backward: NDArray[np.bool_]  # whether no gradient was averaged during backward
    memory: MemoryReports


@dataclass(frozen=True)
class MeasuredStep:
    """A step of a full global batch that every rank has reported; all tuples have W values."""

    step: int  # counted from 0 over the whole run
    local_batches: tuple[int, ...]  # the split that it ran with
    compute_seconds: tuple[float, ...]
    sync_seconds: tuple[float, ...]  # 0 for unknown
    averaged_after_backward: bool = False  # on at least one rank


class MeasurementJoin:
    """Joins the ranks' measurements by step: a step is complete once all ranks have reported it."""

    KEPT_STEPS = 64
    """Steps after which a measurement is dropped if some rank has not reported it. Chosen: ranks are at most a few
    steps apart, so this only bounds memory."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._reported: dict[int, dict[int, tuple[float, float, bool]]] = {}  # by step and rank

    def add(self, reports: StepReports, schedule: Schedule) -> tuple[MeasuredStep, ...]:
        """Add the reports of all ranks; returns the steps that are now complete, with their splits from `schedule`."""
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
        oldest = max(steps) - self.KEPT_STEPS
        self._reported = {step: ranks for step, ranks in self._reported.items() if step >= oldest}
        return tuple(joined)
