"""How long this rank has computed in its optimizer steps, until the other ranks know."""

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from lightning_hetero.device.step_timer import StepTiming
from lightning_hetero.sampling.train_sampler import Share


@dataclass(frozen=True)
class StepMeasurement:
    """Means over the micro-batches of an optimizer step on one rank."""

    measured_step: int  # the global batch of the last of them
    compute_seconds: float
    sync_seconds: float  # from the rank's last local gradient to the averaged ones
    averaged_after_backward: bool  # gradients were averaged after the backward pass, not during it


@dataclass
class _OptimizerStep:
    """The micro-batches since the last optimizer step; of those of full size, share and timing."""

    micro_batches: int = 0
    full: list[tuple[Share, StepTiming]] = field(default_factory=list)
    is_comparable: bool = True
    averaged_after_backward: bool = False


class ComputeTimes:
    """Measures optimizer steps, each as the mean over its micro-batches; short last batches are left out.

    A step is not measured if one of its batches was borrowed, computed in parts or not timed, or if the plan changed
    between them. A measurement may have to wait for the device to come to the end of the step.
    """

    WAITING = 16
    """Optimizer steps that wait for their device; it is never that far behind the host."""

    def __init__(self) -> None:
        self._current = _OptimizerStep()
        self._finished: deque[_OptimizerStep] = deque(maxlen=self.WAITING)

    @property
    def accumulates(self) -> bool:
        """Whether an optimizer step has begun, but not ended: between its micro-batches."""
        return self._current.micro_batches > 0

    def add(
        self,
        timing: StepTiming | None,
        share: Share | None,
        global_batch: int,
        *,
        stepped: bool,
        in_parts: bool = False,
        averaged_after_backward: bool = False,
    ) -> None:
        """A micro-batch is over.

        Args:
            timing: None where it was not measured.
            share: None where the user shards.
            global_batch: samples of a full one.
            stepped: the optimizer has made its step, or may have.
            in_parts: memory ran out, and it was computed in parts.
            averaged_after_backward: see `StepMeasurement`.
        """
        current = self._current
        current.micro_batches += 1
        current.averaged_after_backward |= averaged_after_backward
        if timing is None or share is None or share.borrowed or in_parts:
            current.is_comparable = False
        elif sum(share.counts) == global_batch:
            current.full.append((share, timing))
        if stepped:
            if current.is_comparable and len({share.checksum for share, _ in current.full}) == 1:
                self._finished.append(current)
            self._current = _OptimizerStep()

    def next_measurement(self) -> StepMeasurement | None:
        """The oldest optimizer step that is not reported yet; None if there is none whose end the device has passed."""
        if not self._finished or not self._finished[0].full[-1][1].has_passed():
            return None
        step = self._finished.popleft()
        return StepMeasurement(
            measured_step=step.full[-1][0].step,
            compute_seconds=fmean(timing.compute_seconds() for _, timing in step.full),
            sync_seconds=fmean(timing.sync_seconds() for _, timing in step.full),
            averaged_after_backward=step.averaged_after_backward,
        )
