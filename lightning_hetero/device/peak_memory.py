"""The peak memory of this process in a step, on its device."""

import contextlib
from collections import Counter
from pathlib import Path

import torch

from lightning_hetero.device import linux_memory
from lightning_hetero.device.linux_memory import PROC


class PeakMemory:
    """Measures the first few steps of each local batch.

    On CUDA, the memory that torch has allocated; it is counted on the host, so nothing waits for the device. torch's
    peak statistics, which a user may want to read, are reset in those few steps only. On the CPU, resident pages
    without those of files; reading them takes 0.1 ms. An allocator may keep freed memory, so on the CPU only steps at
    least as large as all before are measured: a later, smaller one would seem to need as much.
    """

    MEASURED_STEPS = 8
    """Steps measured per local batch. Chosen: the first ones of a process are not typical."""

    def __init__(self, device: torch.device, proc: Path = PROC) -> None:
        self._device = device
        self._proc = proc
        self._measured: Counter[int] = Counter()  # number of steps, by local batch
        self.resting = self._held()  # bytes before any step

    def start(self, local_batch: int) -> None:
        """Begin a step: reset the peak."""
        if not self._measures(local_batch):
            return
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Without the permission, the peak is since the process started, which is more than this step's: still safe.
            with contextlib.suppress(OSError):
                linux_memory.forget_peak(self._proc)

    def of_step(self, local_batch: int) -> float:
        """The peak since `start` in bytes; 0 if this step is not measured."""
        if not self._measures(local_batch):
            return 0.0
        self._measured[local_batch] += 1
        return self._held(peak=True)

    def _measures(self, local_batch: int) -> bool:
        comparable = self._device.type == "cuda" or local_batch >= max(self._measured, default=0)
        return comparable and self._measured[local_batch] < self.MEASURED_STEPS

    def _held(self, *, peak: bool = False) -> float:
        if self._device.type != "cuda":
            return linux_memory.resident_bytes(self._proc, peak=peak)
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)  # the flat variant takes far longer
        return float(stats["allocated_bytes"]["all"]["peak" if peak else "current"]) if stats else 0.0
