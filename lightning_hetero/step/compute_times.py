"""How long this rank has computed in its optimizer steps, until the other ranks are told."""

from collections import deque

from lightning_hetero.device.step_timer import StepTiming
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.accumulation import AccumulationWindow, WindowMeasurement


class ComputeTimes:
    """Measurements of this rank's optimizer steps, which may have to wait for the device to come to their end."""

    WAITING = 16
    """Optimizer steps that wait for their device; it is never that far behind the host."""

    def __init__(self) -> None:
        self._window = AccumulationWindow()
        self._finished: deque[AccumulationWindow] = deque(maxlen=self.WAITING)
        self._micro_batches = 0

    @property
    def accumulates(self) -> bool:
        """Whether an optimizer step has begun, but not ended: between its micro-batches."""
        return self._micro_batches > 0

    def add(
        self,
        timing: StepTiming | None,
        share: Share | None,
        global_batch: int,
        *,
        stepped: bool,
        in_parts: bool,
        averaged_after_backward: bool,
    ) -> None:
        """A micro-batch is over.

        Args:
            timing: None where it was not measured.
            share: of this rank; None where the user shards.
            global_batch: samples of a full step.
            stepped: the optimizer has made its step, or may have.
            in_parts: memory ran out, and it was computed in parts.
            averaged_after_backward: gradients were not averaged during the backward pass.
        """
        self._window.add(
            timing, share, global_batch, in_parts=in_parts, averaged_after_backward=averaged_after_backward
        )
        self._micro_batches += 1
        if stepped:
            if self._window.is_comparable():
                self._finished.append(self._window)
            self._window, self._micro_batches = AccumulationWindow(), 0

    def next_measurement(self) -> WindowMeasurement | None:
        """The oldest optimizer step that is not reported yet; None if there is none whose end the device has passed."""
        if self._finished and self._finished[0].has_passed():
            return self._finished.popleft().measured()
        return None
