"""How much memory each rank may hold: what its device has, divided by the ranks that share it."""

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

    on_host: bool  # the rank computes in the machine's main memory, which it shares with others
    machine: str  # an identifier; ranks on the same machine have the same
    total: float  # bytes of the device, or of the machine; infinity if not known
    groups: Mapping[str, float] = field(default_factory=dict)  # bytes that control groups allow for all their processes


def memory_capacity(device: torch.device, proc: Path = PROC, cgroups: Path = CGROUPS) -> MemoryCapacity:
    """What there is on this machine for a rank on `device`."""
    machine = f"{platform.node()}/{linux_memory.machine_id(proc)}"
    if device.type == "cuda":
        return MemoryCapacity(False, machine, float(torch.cuda.get_device_properties(device).total_memory))
    groups = linux_memory.control_group_limits(proc, cgroups)
    return MemoryCapacity(True, machine, linux_memory.total_bytes(proc), groups)


def memory_limits(capacities: Sequence[MemoryCapacity], memory_limit: float) -> tuple[float, ...]:
    """The bytes that each of W ranks may hold.

    A machine's memory is divided by the ranks that compute in it, and that of a control group by those that are in it.
    A user who gives bytes may know better: ranks may share pages, each of which counts for all of them.

    Args:
        capacities: of W ranks.
        memory_limit: up to 1 the part of a rank's share of what there is; above it bytes, but no more than there are.
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
