"""What the system reports about memory: control groups of both versions, from files like the kernel's."""

from pathlib import Path

import pytest

from lightning_hetero.device.linux_memory import control_group_limits
from tests.device.system_files import GIB, system


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
    found = control_group_limits(proc, cgroups)
    assert {str(Path(name).relative_to(cgroups)).removeprefix("."): size for name, size in found.items()} == expected
