"""Unequal CPU ranks on one machine: how much of a core each process may have.

A control group with a CPU quota where this user may make one; otherwise processes that compete for the same core.
"""

import contextlib
import errno
import multiprocessing
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

PERIOD = 10_000
"""Microseconds. Quotas throttle in periods: with long ones, short steps come out at random."""

_PREFIX = "lightning_hetero_benchmark"
_PATIENCE = 5.0  # seconds until a group whose processes were killed is empty


def parse_quotas(text: str) -> list[int]:
    """Percents of a core, one a rank, fastest first.

    Raises:
        ValueError: they are no such numbers.
    """
    quotas = [int(part) for part in text.split(",")]
    if any(not 10 <= quota <= 100 for quota in quotas):
        raise ValueError(f"quotas are percents of a core from 10 to 100, got {text}")
    if quotas != sorted(quotas, reverse=True):
        raise ValueError(f"the fastest rank comes first, got {text}")
    return quotas


def place(quotas: Sequence[int], cores: Sequence[int]) -> list[int]:
    """A core for each rank, so that no core is promised to more than 100%.

    Raises:
        ValueError: there are too few cores.
    """
    free = dict.fromkeys(cores, 100)
    placed = []
    for quota in quotas:
        core = next((core for core, left in free.items() if left >= quota), None)
        if core is None:
            raise ValueError(f"quotas {list(quotas)} do not fit on {len(cores)} cores")
        free[core] -= quota
        placed.append(core)
    return placed


def idle_seconds(stat: Path = Path("/proc/stat")) -> dict[int, float]:
    """Seconds that each core has been idle since the machine was started, to a hundredth.

    What is not idle is work. The kernel's own figures of work are sampled by its clock tick, and quotas beat with that.
    """
    seconds = {}
    for line in stat.read_text().splitlines():
        if match := re.match(r"cpu(\d+) ", line):
            _user, _nice, _system, idle, iowait, *_ = map(int, line.split()[1:])
            seconds[int(match[1])] = (idle + iowait) / os.sysconf("SC_CLK_TCK")
    return seconds


@dataclass(frozen=True)
class Hierarchy:
    """Where control groups with CPU quotas are made.

    Attributes:
        root: the folder of the root group.
        version: of the kernel's interface, 1 or 2.
    """

    root: Path
    version: int

    @classmethod
    def find(cls, mounts: Path = Path("/proc/mounts")) -> Self | None:
        """The machine's, or None."""
        for line in mounts.read_text().splitlines() if mounts.exists() else ():
            _, folder, kind, options, *_ = line.split()
            if kind == "cgroup" and "cpu" in options.split(","):
                return cls(Path(folder), 1)
            controllers = Path(folder) / "cgroup.controllers"
            if kind == "cgroup2" and controllers.exists() and "cpu" in controllers.read_text().split():
                return cls(Path(folder), 2)
        return None

    def make(self, name: str, quota: int) -> Path:
        """A group that gets `quota` percent of a core; without the right to make it, nothing is left behind.

        Raises:
            OSError: it can't be made.
        """
        if self.version == 2:
            (self.root / "cgroup.subtree_control").write_text("+cpu")
        folder = self.root / name
        folder.mkdir()
        try:
            if self.version == 1:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            self.limit(folder, quota)
        except BaseException:
            self.remove(folder)
            raise
        return folder

    def limit(self, folder: Path, quota: int) -> None:
        """Give a group another part of a core; what runs in it notices from the next period on.

        Raises:
            OSError: it can't be written.
        """
        microseconds = PERIOD * quota // 100
        if self.version == 1:
            (folder / "cpu.cfs_quota_us").write_text(str(microseconds))
        else:
            (folder / "cpu.max").write_text(f"{microseconds} {PERIOD}")

    def remove(self, folder: Path) -> None:
        """Take a group away; whatever still runs in it goes back to the root group."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(OSError):  # gone already, or just ending
                for pid in (folder / "cgroup.procs").read_text().split():
                    (self.root / "cgroup.procs").write_text(pid)
            try:
                folder.rmdir()
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def sweep(self) -> None:
        """Remove the groups of benchmarks that were killed before they could do so."""
        for folder in self.root.glob(f"{_PREFIX}_*"):
            owner = re.fullmatch(rf"{_PREFIX}_(\d+)_\d+", folder.name)
            if owner and not Path(f"/proc/{owner[1]}").exists():
                self.remove(folder)


def _compete(core: int) -> None:
    os.sched_setaffinity(0, {core})
    parent = os.getppid()
    while os.getppid() == parent:
        sum(range(100_000))


class Quotas:
    """Holds ranks to their quotas, for as long as the `with` block lasts.

    Args:
        quotas: W percents of a core.
        cores: W numbers of cores.
        hierarchy: where groups can be made; None means that they can't.
    """

    def __init__(self, quotas: Sequence[int], cores: Sequence[int], hierarchy: Hierarchy | None) -> None:
        self._quotas = list(quotas)
        self._cores = cores
        self._hierarchy = hierarchy
        self._groups: dict[int, Path] = {}
        self._competitors: dict[int, list[BaseProcess]] = {}
        self.taken: dict[int, float] = {}
        """For each core, the part of it that competing processes take on purpose."""
        self.means = "no rank is limited"
        """How the quotas are enforced, in a sentence for the report."""

    def __enter__(self) -> Self:
        limited = [rank for rank, quota in enumerate(self._quotas) if quota < 100]
        if not limited:
            return self
        try:
            self._make_groups(limited)
            self.means = f"control groups (version {self._hierarchy.version if self._hierarchy else '?'})"
            self.means += f", period {PERIOD // 1000} ms"
        except OSError as error:
            self._close()
            self._start_competitors(limited)
            self.means = f"competing processes on the same core, because control groups can't be used: {error}"
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def join(self, rank: int, pid: int) -> None:
        """Hold a process to the quota of a rank."""
        if rank in self._groups:
            (self._groups[rank] / "cgroup.procs").write_text(str(pid))

    def change(self, rank: int, quota: int) -> None:
        """Hold a rank, which was limited from the start, to another quota from now on.

        Raises:
            ValueError: it was not limited.
        """
        if rank in self._groups:
            assert self._hierarchy is not None
            self._hierarchy.limit(self._groups[rank], quota)
        elif rank in self._competitors:
            self._end_competitors(rank)
        else:
            raise ValueError(f"rank {rank} has a whole core from the start, so its quota can't change")
        self._quotas[rank] = quota
        if rank not in self._groups:
            self._start_competitors([rank])

    def _make_groups(self, ranks: Sequence[int]) -> None:
        if self._hierarchy is None:
            raise OSError("there is no hierarchy with a CPU controller")
        self._hierarchy.sweep()
        for rank in ranks:
            name = f"{_PREFIX}_{os.getpid()}_{rank}"
            self._groups[rank] = self._hierarchy.make(name, self._quotas[rank])

    def _start_competitors(self, ranks: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in ranks:
            self.taken[self._cores[rank]] = 1 - self._quotas[rank] / 100
            self._competitors[rank] = []
            for _ in range(max(1, round(100 / self._quotas[rank]) - 1)):
                process = context.Process(target=_compete, args=(self._cores[rank],), daemon=True)
                process.start()
                self._competitors[rank].append(process)

    def _end_competitors(self, rank: int) -> None:
        for process in self._competitors.pop(rank):
            process.kill()
            process.join()

    def _close(self) -> None:
        for rank in list(self._competitors):
            self._end_competitors(rank)
        for folder in self._groups.values():
            assert self._hierarchy is not None
            self._hierarchy.remove(folder)
        self._groups.clear()
