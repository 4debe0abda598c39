"""What a rank measures of an optimizer step: the mean over its micro-batches, if these can be compared."""

from dataclasses import dataclass

from lightning_hetero.device.step_timer import StepTiming
from lightning_hetero.sampling.train_sampler import Share


@dataclass(frozen=True)
class WindowMeasurement:
    """Means over the micro-batches of an optimizer step on one rank.

    Attributes:
        step: global batch of the last of them.
        compute_seconds: compute time.
        sync_seconds: from the rank's last local gradient to the averaged ones.
        averaged_after_backward: gradients were averaged after the backward pass, not during it.
    """

    step: int
    compute_seconds: float
    sync_seconds: float
    averaged_after_backward: bool


class AccumulationWindow:
    """The micro-batches of a rank since its last optimizer step.

    Short last batches are left out. The window is not comparable, and measures nothing, if one of its batches was
    borrowed, computed in parts or not timed, or if the plan changed between them.
    """

    def __init__(self) -> None:
        self._timings: list[StepTiming] = []
        self._shares: list[Share] = []
        self._comparable = True
        self._averaged_after_backward = False

    def add(
        self,
        timing: StepTiming | None,
        share: Share | None,
        global_batch: int,
        *,
        in_parts: bool = False,
        averaged_after_backward: bool = False,
    ) -> None:
        """One more micro-batch.

        Args:
            timing: of it; None if it was not timed.
            share: what this rank has computed of it; None where the user shards.
            global_batch: samples of a full one.
            in_parts: memory ran out, and it was computed in parts.
            averaged_after_backward: gradients were averaged after the backward pass, not during it.
        """
        self._averaged_after_backward |= averaged_after_backward
        if timing is None or share is None or share.borrowed or in_parts:
            self._comparable = False
        elif sum(share.counts) == global_batch:
            self._timings.append(timing)
            self._shares.append(share)

    def is_comparable(self) -> bool:
        """Whether it shows how long a micro-batch takes under one plan."""
        return self._comparable and len({share.checksum for share in self._shares}) == 1

    def has_passed(self) -> bool:
        """Whether the device has come to its end."""
        return self._timings[-1].has_passed()

    def measured(self) -> WindowMeasurement:
        """The measurement; of a comparable window that the device has come to the end of."""
        return WindowMeasurement(
            step=self._shares[-1].step,
            compute_seconds=sum(timing.compute_seconds() for timing in self._timings) / len(self._timings),
            sync_seconds=sum(timing.sync_seconds() for timing in self._timings) / len(self._timings),
            averaged_after_backward=self._averaged_after_backward,
        )
