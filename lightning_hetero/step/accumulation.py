"""What a rank has measured of an optimizer step: its micro-batches, and whether they tell anything."""

from dataclasses import dataclass, field

from lightning_hetero.device.step_timer import StepTiming
from lightning_hetero.sampling.train_sampler import Share


@dataclass
class AccumulationWindow:
    """A rank's own work since its last optimizer step.

    Short last batches are left out. What else can't be compared with others (borrowed samples, a change of plan in
    between) spoils it.
    """

    readings: list[StepTiming] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    comparable: bool = True
    apart: bool = False  # gradients were averaged after the backward pass

    def add(self, reading: StepTiming | None, share: Share | None, global_batch: int) -> None:
        """One more micro-batch."""
        if reading is None or share is None or share.borrowed:
            self.comparable = False
            return
        if sum(share.counts) != global_batch:
            return
        self.readings.append(reading)
        self.shares.append(share)

    def usable(self) -> bool:
        """Whether it tells how long a micro-batch takes under one plan."""
        return self.comparable and bool(self.shares) and len({share.checksum for share in self.shares}) == 1

    def known(self) -> bool:
        """Whether the device has come to its end."""
        return self.readings[-1].has_passed()

    def measured(self) -> dict[str, float]:
        """The window's last step, and a micro-batch's mean seconds of computing and of averaging, for the message."""
        return {
            "measured_step": self.shares[-1].step,
            "compute_seconds": sum(reading.compute_seconds() for reading in self.readings) / len(self.readings),
            "sync_seconds": sum(reading.sync_seconds() for reading in self.readings) / len(self.readings),
            "averaged_after_backward": float(self.apart),
        }
