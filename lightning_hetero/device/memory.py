"""How much memory each rank may use: what its device has, divided by the ranks that share it."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightning_hetero.device import linux_memory
from lightning_hetero.device.linux_memory import CGROUPS, PROC


@dataclass(frozen=True)
class MemoryCapacity:
    """The memory that a rank's device has."""

    on_host: bool  # the rank uses the machine's main memory, which it shares with others
    machine: str  # an identifier, equal for ranks on the same machine
    total: float  # bytes of the device, or of the machine; infinity if not known
    groups: Mapping[str, float] = field(default_factory=dict)  # bytes that each control group allows all its processes


def memory_capacity(device: torch.device, proc: Path = PROC, cgroups: Path = CGROUPS) -> MemoryCapacity:
    """The memory on this machine for a rank on `device`."""
    machine = f"{platform.node()}/{linux_memory.machine_id(proc)}"
    if device.type == "cuda":
        return MemoryCapacity(False, machine, float(torch.cuda.get_device_properties(device).total_memory))
    groups = linux_memory.control_group_limits(proc, cgroups)
    return MemoryCapacity(True, machine, linux_memory.total_bytes(proc), groups)


def memory_limits(capacities: Sequence[MemoryCapacity], memory_limit: float) -> tuple[float, ...]:
    """The bytes that each of W ranks may use.

    A machine's memory is divided by the number of ranks that use it, a control group's by the number of ranks in it. A
    number of bytes is not divided: the user may know better, since ranks may share pages that count for each of them.

    Args:
        capacities: of W ranks.
        memory_limit: up to 1, a fraction of each rank's share of the memory; above 1, bytes, capped at what there is.
    """
    hosts = [capacity for capacity in capacities if capacity.on_host]
    on_machine = Counter(capacity.machine for capacity in hosts)
    in_group = Counter((capacity.machine, group) for capacity in hosts for group in capacity.groups)

    def limit(capacity: MemoryCapacity) -> float:
        if memory_limit > 1:
            return min(memory_limit, capacity.total, *capacity.groups.values())
        if not capacity.on_host:
            return memory_limit * capacity.total
        shared = (size / in_group[capacity.machine, group] for group, size in capacity.groups.items())
        return memory_limit * min([capacity.total / on_machine[capacity.machine], *shared])

    return tuple(map(limit, capacities))
