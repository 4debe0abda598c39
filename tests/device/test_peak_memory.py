"""The most memory of a step, measured where it can be trusted."""

from pathlib import Path

import numpy as np
import torch

from lightning_hetero.device.peak_memory import PeakMemory


def test_the_peak_of_a_step_is_seen_and_only_where_it_can_be_trusted() -> None:
    """Both ends of a bound: pages that were touched in the step, counted in full, and not much more."""
    memory = PeakMemory(torch.device("cpu"))
    resting = memory.resting
    assert resting > 2**20
    memory.start(8)
    pages = np.ones(2**28, dtype=np.uint8)
    del pages
    peak = memory.of_step(8)
    assert 2**28 * 0.9 < peak - resting < 2**28 + 2**28
    assert memory.of_step(7) == 0, "what an allocator keeps would count for a smaller step"
    peaks = [memory.of_step(8) for _ in range(PeakMemory.MEASURED_STEPS)]
    assert min(peaks[:-1]) > 0
    assert peaks[-1] == 0, "it has been measured often enough"
    assert memory.of_step(9) > 0


def test_without_the_right_to_forget_peaks_that_of_the_process_counts(tmp_path: Path) -> None:
    (tmp_path / "self/clear_refs").mkdir(parents=True)  # which can't be written to
    (tmp_path / "self/status").write_text("VmHWM:\t  3000 kB\nVmRSS:\t 2000 kB\nRssFile:\t 500 kB\n")
    memory = PeakMemory(torch.device("cpu"), tmp_path)
    memory.start(4)
    assert memory.resting == 1500 * 1024
    assert memory.of_step(4) == 2500 * 1024


def test_on_a_gpu_peaks_are_forgotten_in_a_few_steps_of_each_size_only(monkeypatch) -> None:
    """Peaks that a user reads from torch later are untouched; a smaller step is measured too."""
    resets = []
    stats = {"allocated_bytes": {"all": {"current": 5.0, "peak": 7.0}}}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: stats)
    memory = PeakMemory(torch.device("cuda"))
    peaks = []
    for local_batch in [8] * 20 + [4] * 20:
        memory.start(local_batch)
        peaks.append(memory.of_step(local_batch))
    assert memory.resting == 5.0
    assert peaks == ([7.0] * PeakMemory.MEASURED_STEPS + [0.0] * (20 - PeakMemory.MEASURED_STEPS)) * 2
    assert len(resets) == 2 * PeakMemory.MEASURED_STEPS
