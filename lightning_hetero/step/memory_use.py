"""What this rank's memory has allowed so far, for its messages to the other ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.device.peak_memory import PeakMemory
from lightning_hetero.step.out_of_memory import MemoryFound


@dataclass(frozen=True)
class MemoryReport:
    """This rank's memory as its messages have it; see `exchange.messages.StepMessage`."""

    local_batch: int
    peak_memory: float
    resting_memory: float
    fits: int
    fails: int


class MemoryUse:
    """Peak memory of this rank's steps, and where memory has run out."""

    def __init__(self, peak: PeakMemory, rank: int, world_size: int) -> None:
        self._peak = peak
        self._rank = rank
        self._largest = np.zeros(world_size)  # (W,) local batches that ranks have computed in one piece
        self.report = MemoryReport(0, 0.0, peak.resting, 0, 0)

    def exceeds_completed(self, local_batches: Sequence[int]) -> bool:
        """Whether a rank has more samples than it has ever computed in one piece; the same on all ranks."""
        return bool(np.greater(local_batches, self._largest).any())

    def is_too_large(self, local_batch: int) -> bool:
        """Whether memory has run out with as many samples, or with fewer."""
        return 0 < self.report.fails <= local_batch

    def update(self, local_batches: NDArray[np.float64]) -> None:
        """All ranks have reported what they computed in one piece: (W,) samples, 0 for none."""
        self._largest = np.maximum(self._largest, local_batches)

    def start(self, local_batch: int) -> None:
        """A step begins."""
        self._peak.start(local_batch)

    def end(self, local_batch: int, found: MemoryFound | None) -> None:
        """A step is over, with `found` if in parts; the local batch is 0 where samples are borrowed, or not known."""
        fits, fails = self.report.fits, self.report.fails
        if found is not None and found.fails is not None and local_batch:  # borrowed samples are no measure
            known = int(self._largest[self._rank])
            fits = min(fits or found.fits, found.fits) if known >= local_batch else max(fits, found.fits, known)
            fails = max(min(fails or found.fails, found.fails), fits + 1)
        in_one_piece = 0 if found is not None else local_batch
        if fits:
            fits = max(fits, in_one_piece)
            fails = max(fails, fits + 1)
        peak = self._peak.of_step(in_one_piece) if in_one_piece else 0.0
        self.report = MemoryReport(in_one_piece, peak, self._peak.resting, fits, fails)
