"""What a device has: control groups of both versions from files, shared by the ranks in them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_hetero.device.memory import MemoryCapacity, PeakMemory, groups, limits, memory_capacity

GIB = 2.0**30


def system(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/user/job/task\n",
                "cgroup/user/job/task/memory.max": "max\n",
                "cgroup/user/job/memory.max": "4294967296\n",
                "cgroup/user/memory.max": "8589934592\n",
            },
            {"user/job": 4 * GIB, "user": 8 * GIB},
            id="version 2, own group unlimited, parents limited",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "1073741824\n"},
            {"": GIB},
            id="version 2, a container's root",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n",
                "cgroup/memory/a/b/memory.limit_in_bytes": "2147483648\n",
                "cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            {"memory/a/b": 2 * GIB},
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/docker/0123\n",
                "cgroup/memory/memory.limit_in_bytes": "3221225472\n",
            },
            {"memory": 3 * GIB},
            id="version 1 in a container, whose path is that of the machine outside",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/a\n0::/b\n",
                "cgroup/memory/a/memory.limit_in_bytes": "1073741824\n",
                "cgroup/unified/b/memory.max": "2147483648\n",
            },
            {"memory/a": GIB, "unified/b": 2 * GIB},
            id="both at once",
        ),
        pytest.param({"proc/self/cgroup": "0::/a\n"}, {}, id="no files"),
        pytest.param({}, {}, id="no control groups"),
    ],
)
def test_control_groups(tmp_path: Path, files: dict[str, str], expected: dict[str, float]) -> None:
    proc, cgroups = system(tmp_path, files)
    found = groups(proc, cgroups)
    assert {str(Path(name).relative_to(cgroups)).removeprefix("."): size for name, size in found.items()} == expected


def test_a_rank_on_the_cpu_has_the_machine_and_its_groups(tmp_path: Path) -> None:
    proc, cgroups = system(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n",
            "proc/self/cgroup": "0::/a\n",
            "cgroup/a/memory.max": "1073741824",
        },
    )
    room = memory_capacity(torch.device("cpu"), proc, cgroups)
    assert room.on_host
    assert room.total == 16 * GIB
    assert list(room.groups.values()) == [GIB]


def test_this_machine_has_memory() -> None:
    assert 2**27 < memory_capacity(torch.device("cpu")).total < float("inf")


def cpu(machine: str = "a", **sizes: float) -> MemoryCapacity:
    return MemoryCapacity(True, machine, 16.0, sizes)


def gpu(total: float = 80.0) -> MemoryCapacity:
    return MemoryCapacity(False, "a", total)


@pytest.mark.parametrize(
    ("rooms", "memory_limit", "expected"),
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
def test_limits_are_shared_by_those_who_are_in_them(rooms, memory_limit, expected) -> None:
    assert limits(rooms, memory_limit) == pytest.approx(expected)


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
    told = [memory.of_step(8) for _ in range(PeakMemory.LOOKED_AT)]
    assert min(told[:-1]) > 0
    assert told[-1] == 0, "it has been looked at often enough"
    assert memory.of_step(9) > 0


def test_without_the_right_to_forget_peaks_that_of_the_process_counts(tmp_path: Path) -> None:
    proc, _ = system(tmp_path, {"proc/self/status": "VmHWM:\t  3000 kB\nVmRSS:\t 2000 kB\nRssFile:\t 500 kB\n"})
    (proc / "self/clear_refs").mkdir()
    memory = PeakMemory(torch.device("cpu"), proc)
    memory.start(4)
    assert memory.resting == 1500 * 1024
    assert memory.of_step(4) == 2500 * 1024


def test_on_a_gpu_peaks_are_forgotten_in_a_few_steps_of_each_size_only(monkeypatch) -> None:
    """What the user reads of torch's peaks afterwards is his own; a smaller step tells its peak too."""
    resets = []
    stats = {"allocated_bytes": {"all": {"current": 5.0, "peak": 7.0}}}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: stats)
    memory = PeakMemory(torch.device("cuda"))
    told = []
    for local_batch in [8] * 20 + [4] * 20:
        memory.start(local_batch)
        told.append(memory.of_step(local_batch))
    assert memory.resting == 5.0
    assert told == ([7.0] * PeakMemory.LOOKED_AT + [0.0] * (20 - PeakMemory.LOOKED_AT)) * 2
    assert len(resets) == 2 * PeakMemory.LOOKED_AT
