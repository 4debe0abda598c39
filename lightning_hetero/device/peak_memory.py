"""The most memory that this process holds in a step, on its device."""

import contextlib
from collections import Counter
from pathlib import Path

import torch

from lightning_hetero.device import linux_memory
from lightning_hetero.device.linux_memory import PROC


class PeakMemory:
    """Measures the first few steps of each local batch.

    On CUDA, what torch has allocated; it is counted on the host, so nothing waits for the device. Peaks that somebody
    else wants to read are reset in those few steps only. On the CPU, resident pages without those of files; asking for
    them takes a tenth of a millisecond. An allocator may keep what it was given, so there only steps at least as large
    as all before are measured: a later, smaller one would seem to need as much.
    """

    MEASURED = 8
    """Steps with the same local batch: the first ones of a process are not typical yet."""

    def __init__(self, device: torch.device, proc: Path = PROC) -> None:
        self._device = device
        self._proc = proc
        self._measured: Counter[int] = Counter()  # steps, by local batch
        self.resting = self._held()  # bytes before any step

    def start(self, local_batch: int) -> None:
        """A step begins: forget earlier peaks."""
        if not self._measures(local_batch):
            return
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Without the right to, the peak is that of the process's life, which is more than this step's: still safe.
            with contextlib.suppress(OSError):
                linux_memory.forget_peak(self._proc)

    def of_step(self, local_batch: int) -> float:
        """The peak since `start` in bytes; 0 where it is not measured."""
        if not self._measures(local_batch):
            return 0.0
        self._measured[local_batch] += 1
        return self._held(peak=True)

    def _measures(self, local_batch: int) -> bool:
        comparable = self._device.type == "cuda" or local_batch >= max(self._measured, default=0)
        return comparable and self._measured[local_batch] < self.MEASURED

    def _held(self, *, peak: bool = False) -> float:
        if self._device.type != "cuda":
            return linux_memory.resident_bytes(self._proc, peak=peak)
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)  # the flat one takes far longer to make
        return float(stats["allocated_bytes"]["all"]["peak" if peak else "current"]) if stats else 0.0
