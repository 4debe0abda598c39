"""What a device has, shared by the ranks that compute in it."""

from pathlib import Path

import pytest
import torch

from lightning_hetero.device.memory import MemoryCapacity, memory_capacity, memory_limits
from tests.device.system_files import GIB, system


def test_a_rank_on_the_cpu_has_the_machine_and_its_groups(tmp_path: Path) -> None:
    proc, cgroups = system(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n",
            "proc/self/cgroup": "0::/a\n",
            "cgroup/a/memory.max": "1073741824",
        },
    )
    capacity = memory_capacity(torch.device("cpu"), proc, cgroups)
    assert capacity.on_host
    assert capacity.total == 16 * GIB
    assert list(capacity.groups.values()) == [GIB]


def test_this_machine_has_memory() -> None:
    assert 2**27 < memory_capacity(torch.device("cpu")).total < float("inf")


def cpu(machine: str = "a", **sizes: float) -> MemoryCapacity:
    return MemoryCapacity(True, machine, 16.0, sizes)


def gpu(total: float = 80.0) -> MemoryCapacity:
    return MemoryCapacity(False, "a", total)


@pytest.mark.parametrize(
    ("capacities", "memory_limit", "expected"),
    [
        ([cpu()], 1.0, [16]),
        ([cpu(), cpu()], 0.5, [4, 4]),
        ([cpu(), cpu("b")], 0.5, [8, 8]),
        ([gpu(80), gpu(40), cpu()], 0.5, [40, 20, 8]),
        ([cpu(job=6), cpu(job=6)], 1.0, [3, 3]),
        ([cpu(job=6), cpu(other=6)], 1.0, [6, 6]),
        ([cpu(job=6), cpu("b", job=6)], 1.0, [6, 6]),
        ([cpu(job=6, user=7), cpu(user=7)], 1.0, [3.5, 3.5]),
        ([cpu(job=6), cpu()], 1.0, [6, 8]),
        ([gpu(80), cpu(), cpu()], 10, [10, 10, 10]),
        ([gpu(8), cpu(job=9), cpu()], 20, [8, 9, 16]),
    ],
)
def test_limits_are_divided_among_the_ranks_that_share_them(capacities, memory_limit, expected) -> None:
    assert memory_limits(capacities, memory_limit) == pytest.approx(expected)
