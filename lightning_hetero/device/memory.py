"""What a device has in memory, and the most that this process held of it in a step."""

import contextlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class MemoryCapacity:
    """The memory that a rank's device has.

    Args:
        on_host: the rank computes in the machine's main memory, which it shares with others.
        machine: tells machines apart.
        total: bytes of the device, or of the machine; infinity if not known.
        groups: from the control groups that the process is in to the bytes that each allows for all in it.
    """

    on_host: bool
    machine: str
    total: float
    groups: Mapping[str, float] = field(default_factory=dict)


def memory_capacity(
    device: torch.device, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> MemoryCapacity:
    """What there is on this machine for a rank on `device`."""
    machine = f"{platform.node()}/{_read(proc / 'sys/kernel/random/boot_id') or ''}"
    if device.type == "cuda":
        return MemoryCapacity(
            on_host=False, machine=machine, total=float(torch.cuda.get_device_properties(device).total_memory)
        )
    return MemoryCapacity(
        True, machine, _status(_read(proc / "meminfo") or "", "MemTotal") or float("inf"), groups(proc, cgroups)
    )


def groups(proc: Path, cgroups: Path) -> dict[str, float]:
    """The memory limits of this process's control groups and their parents, version 1 and 2; unlimited ones left out.

    In a container, the path of a group may be that of the machine outside; then the container's own root counts.
    """
    found: dict[str, float] = {}
    for line in (_read(proc / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots, name = (cgroups, cgroups / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = (cgroups / "memory", cgroups / controllers), "memory.limit_in_bytes"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for root in roots:
            for folder in [root / inside, *(root / parent for parent in inside.parents)]:
                text = _read(folder / name)
                # Version 1 writes the largest number of pages there is for no limit, version 2 "max".
                if text is not None and text.isdigit() and int(text) < 2**60:
                    found[str(folder)] = float(text)
    return found


def limits(rooms: Sequence[MemoryCapacity], memory_limit: float) -> tuple[float, ...]:
    """The bytes that each rank may hold.

    A machine's memory is divided by the ranks that compute in it, and that of a control group by those that are in it.
    Whoever gives bytes may know better: ranks may share pages, each of which counts for all of them.

    Args:
        rooms: of W ranks.
        memory_limit: up to 1 the part of a rank's share of what there is; above it bytes, but no more than there are.
    """
    on_machine = Counter(room.machine for room in rooms if room.on_host)
    in_group = Counter((room.machine, group) for room in rooms if room.on_host for group in room.groups)
    result = []
    for room in rooms:
        if memory_limit > 1:
            result.append(min(memory_limit, room.total, *room.groups.values()))
            continue
        available = room.total
        if room.on_host:
            available /= on_machine[room.machine]
            shared = (size / in_group[room.machine, group] for group, size in room.groups.items())
            available = min([available, *shared])
        result.append(memory_limit * available)
    return tuple(result)


class PeakMemory:
    """The most bytes that this process holds in a step, on its device; told of the first few steps of each size.

    On CUDA, what torch has allocated; it is counted on the host, so nothing waits for the device. Peaks that somebody
    else wants to read are forgotten in those few steps only. On the CPU, resident pages without those of files, which
    the system can take back; asking for them takes a tenth of a millisecond. An allocator may keep what it was given,
    so there a peak is told only of steps at least as large as all before: a later, smaller one would seem to need as
    much.

    Args:
        device: of this rank.
        proc: where the system tells of processes.
    """

    LOOKED_AT = 8
    """Steps with the same local batch."""

    def __init__(self, device: torch.device, proc: Path = Path("/proc")) -> None:
        self._device = device
        self._proc = proc / "self"
        self._looked: Counter[int] = Counter()  # at steps, by local batch
        self.resting = self._cuda("current") if device.type == "cuda" else self._resident("VmRSS")

    def start(self, local_batch: int) -> None:
        """A step begins: forget earlier peaks."""
        if not self._looks_at(local_batch):
            return
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Without the right to, the peak is that of the process's life, which is more than this step's: still safe.
            with contextlib.suppress(OSError):
                (self._proc / "clear_refs").write_text("5")

    def of_step(self, local_batch: int) -> float:
        """The peak since `start`; 0 where it is not known."""
        if not self._looks_at(local_batch):
            return 0.0
        self._looked[local_batch] += 1
        return self._cuda("peak") if self._device.type == "cuda" else self._resident("VmHWM")

    def _looks_at(self, local_batch: int) -> bool:
        comparable = self._device.type == "cuda" or local_batch >= max(self._looked, default=0)
        return comparable and self._looked[local_batch] < self.LOOKED_AT

    def _cuda(self, which: str) -> float:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)  # the flat one takes far longer to make
        return float(stats["allocated_bytes"]["all"][which]) if stats else 0.0

    def _resident(self, which: str) -> float:
        text = _read(self._proc / "status") or ""
        return max(0.0, _status(text, which) - _status(text, "RssFile"))


def _status(text: str, name: str) -> float:
    """Bytes behind a name in the system's tables; 0 if it is not there."""
    start = text.find(f"{name}:")
    return float(text[start + len(name) + 1 :].split(maxsplit=1)[0]) * 1024 if start >= 0 else 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
