"""What has fitted in this rank's memory so far, for its messages to the other ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.device.peak_memory import PeakMemory
from lightning_hetero.step.out_of_memory import MemoryBounds


@dataclass(frozen=True)
class MemoryReport:
    """This rank's memory, as fields of its message; see `exchange.messages.StepMessage`."""

    local_batch: int
    peak_memory: float
    resting_memory: float
    fits: int
    fails: int


class MemoryUse:
    """Peak memory of this rank's steps, and the local batches at which memory has run out."""

    def __init__(self, peak: PeakMemory, rank: int, world_size: int) -> None:
        self._peak = peak
        self._rank = rank
        self._largest = np.zeros(world_size)  # (W,) largest local batches computed in one piece
        self.report = MemoryReport(0, 0.0, peak.resting, 0, 0)

    def exceeds_completed(self, local_batches: Sequence[int]) -> bool:
        """Whether any rank has more samples than it has ever computed in one piece; the same on all ranks."""
        return bool(np.greater(local_batches, self._largest).any())

    def is_too_large(self, local_batch: int) -> bool:
        """Whether memory has run out with at most this many samples."""
        return 0 < self.report.fails <= local_batch

    def update(self, local_batches: NDArray[np.float64]) -> None:
        """Record what all ranks have reported: (W,) samples computed in one piece, 0 for none."""
        self._largest = np.maximum(self._largest, local_batches)

    def start(self, local_batch: int) -> None:
        """Begin a step."""
        self._peak.start(local_batch)

    def end(self, local_batch: int, bounds: MemoryBounds | None) -> None:
        """End a step, with `bounds` if it ran in parts; the local batch is 0 if borrowed, or not known."""
        fits, fails = self.report.fits, self.report.fails
        if bounds is not None and bounds.fails is not None and local_batch:  # borrowed samples are not representative
            known = int(self._largest[self._rank])
            fits = min(fits or bounds.fits, bounds.fits) if known >= local_batch else max(fits, bounds.fits, known)
            fails = max(min(fails or bounds.fails, bounds.fails), fits + 1)
        in_one_piece = 0 if bounds is not None else local_batch
        if fits:
            fits = max(fits, in_one_piece)
            fails = max(fails, fits + 1)
        peak = self._peak.of_step(in_one_piece) if in_one_piece else 0.0
        self.report = MemoryReport(in_one_piece, peak, self._peak.resting, fits, fails)
