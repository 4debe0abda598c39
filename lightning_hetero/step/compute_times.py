"""This rank's compute times in its optimizer steps, kept until they are reported to the other ranks."""

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from lightning_hetero.device.step_timer import StepTiming
from lightning_hetero.sampling.train_sampler import Share


@dataclass(frozen=True)
class StepMeasurement:
    """Means over the micro-batches of an optimizer step on one rank."""

    measured_step: int  # the last of these global batches
    compute_seconds: float
    sync_seconds: float  # from the rank's last local gradient to the averaged ones
    averaged_after_backward: bool  # gradients were averaged after the backward pass, not during it


@dataclass
class _OptimizerStep:
    """The micro-batches since the last optimizer step, with share and timing of those of full size."""

    micro_batches: int = 0
    full: list[tuple[Share, StepTiming]] = field(default_factory=list)
    is_comparable: bool = True
    averaged_after_backward: bool = False


class ComputeTimes:
    """Measures optimizer steps, each as the mean over its micro-batches; short last batches are left out.

    A step is not measured if one of its micro-batches was borrowed, computed in parts or not timed, or if the plan
    changed between them. A measurement is not available before the device has reached the end of the step.
    """

    MAX_PENDING = 16
    """Optimizer steps kept until the device has reached their end. Chosen: it is never that far behind the host."""

    def __init__(self) -> None:
        self._current = _OptimizerStep()
        self._finished: deque[_OptimizerStep] = deque(maxlen=self.MAX_PENDING)

    @property
    def accumulates(self) -> bool:
        """Whether this is between two micro-batches of the same optimizer step."""
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
        """Record a finished micro-batch.

        Args:
            timing: None if it was not timed.
            share: None if the user shards.
            global_batch: samples in a full one.
            stepped: whether the optimizer has stepped, or may have.
            in_parts: whether it was computed in parts because memory ran out.
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
        """The oldest measurement not returned yet; None if there is none whose step the device has finished."""
        if not self._finished or not self._finished[0].full[-1][1].has_passed():
            return None
        step = self._finished.popleft()
        return StepMeasurement(
            measured_step=step.full[-1][0].step,
            compute_seconds=fmean(timing.compute_seconds() for _, timing in step.full),
            sync_seconds=fmean(timing.sync_seconds() for _, timing in step.full),
            averaged_after_backward=step.averaged_after_backward,
        )
