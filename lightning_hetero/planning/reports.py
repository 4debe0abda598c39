"""What ranks report of their steps, and the steps that every rank has reported.

A rank reports its measurements with the messages of a later step, and ranks may be some steps apart in that.
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
    """What all ranks report with the messages of one step.

    Attributes:
        step: the step that the messages belong to.
        last_drawn: the last step that any rank's loaders have handed out.
        measured_steps: (W,) the step that each rank's measurement belongs to, a full global batch; -1 for none.
        compute_seconds: (W,) seconds of compute time in that step.
        sync_seconds: (W,) seconds from the rank's last local gradient to the averaged ones; 0 for unknown.
        averaged_after_backward: (W,) whether nothing was averaged during the backward pass.
        memory: what the ranks report of their memory.
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
    """A step of a full global batch that every rank has reported.

    Attributes:
        step: the global batch, counted from 0 over the whole run.
        local_batches: W samples, the split that the step ran with.
        compute_seconds: W seconds of compute time.
        sync_seconds: W seconds from each rank's last local gradient to the averaged ones; 0 for unknown.
        averaged_after_backward: whether nothing was averaged during the backward pass of some rank.
    """

    step: int
    local_batches: tuple[int, ...]
    compute_seconds: tuple[float, ...]
    sync_seconds: tuple[float, ...]
    averaged_after_backward: bool = False


class MeasurementJoin:
    """Joins the ranks' measurements by step: a step is complete once all ranks have reported it.

    Args:
        world_size: W.
    """

    PATIENCE = 64
    """Steps after which a measurement that not all ranks have reported is given up. Ranks are a few steps apart: this
    only bounds memory."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._reported: dict[int, dict[int, tuple[float, float, bool]]] = {}  # by step and rank

    def add(self, reports: StepReports, schedule: Schedule) -> tuple[MeasuredStep, ...]:
        """Take in one report of every rank; returns the steps that are complete now.

        Args:
            reports: of all ranks.
            schedule: the plans that the steps ran with.
        """
        steps = reports.measured_steps.tolist()
        measurements = zip(
            reports.compute_seconds.tolist(),
            reports.sync_seconds.tolist(),
            reports.averaged_after_backward.tolist(),
            strict=True,
        )
        for rank, (step, measurement) in enumerate(zip(steps, measurements, strict=True)):
            if step >= 0:
                self._reported.setdefault(step, {})[rank] = measurement
        complete = [step for step, ranks in self._reported.items() if len(ranks) == self._world_size]
        joined = tuple(self._joined(step, schedule) for step in complete)
        for step in [step for step in self._reported if step < max(steps) - self.PATIENCE]:
            del self._reported[step]
        return joined

    def _joined(self, step: int, schedule: Schedule) -> MeasuredStep:
        ranks = self._reported.pop(step)
        compute, sync, after_backward = zip(*(ranks[rank] for rank in range(self._world_size)), strict=True)
        return MeasuredStep(step, schedule.at(step).local_batches, compute, sync, any(after_backward))
