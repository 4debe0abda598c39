"""Chooses the devices that the demo trains on, and prepares the processes of CPU ranks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lightning_hetero.device.allocator import keep_freed_memory

# One competitor leaves the second rank half of its core. With more, plain DDP would look even worse, but at a quarter
# of a core the second rank hardly pays, and training without it would be as good.
COMPETITORS = 1


@dataclass(frozen=True)
class Devices:
    """What each rank drives; the fastest device comes first.

    Args:
        accelerator: as Lightning's Trainer calls it.
        names: W names, as the tables show them.
        gpus: W numbers of GPUs; empty for CPU ranks.
        cores: W cores that CPU ranks are pinned to; empty where there are not enough of them, or no pinning.
        competitors: how many processes compete for the last rank's core.
    """

    accelerator: Literal["cpu", "cuda"]
    names: tuple[str, ...]
    gpus: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    competitors: int = 0

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.names)


def choose() -> Devices:
    """Unequal GPUs where the machine has them; else two CPU ranks, of which one shares its core."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if len({gpu.name for gpu in gpus}) > 1:
        speeds = [(gpu.multi_processor_count, gpu.total_memory) for gpu in gpus]
        order = sorted(range(len(gpus)), key=lambda number: speeds[number], reverse=True)
        return Devices("cuda", tuple(f"{gpus[number].name} (cuda:{number})" for number in order), gpus=tuple(order))
    cores = two_cores()
    names = [f"CPU core {core}" for core in cores] or ["CPU", "CPU"]
    shared = f"shared with {COMPETITORS} competing process{'es' if COMPETITORS > 1 else ''}"
    return Devices("cpu", (names[0], f"{names[1]}, {shared}"), cores=cores, competitors=COMPETITORS)


def two_cores() -> tuple[int, ...]:
    """Two of the cores that this process may use, if possible not two threads of one core; () if there are none."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return ()
    siblings = Path(f"/sys/devices/system/cpu/cpu{allowed[0]}/topology/thread_siblings_list")
    same_core = numbers(siblings.read_text()) if siblings.exists() else set()
    return allowed[0], next((core for core in allowed[1:] if core not in same_core), allowed[1])


def numbers(ranges: str) -> set[int]:
    """Parse the kernel's notation for sets of CPUs: "0-2,8" is 0, 1, 2 and 8."""
    found: set[int] = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def prepare_process(devices: Devices, rank: int) -> None:
    """Prepare this process for device `rank`: pin it to its core, use one thread, and keep freed memory."""
    if devices.accelerator == "cuda":
        return
    if devices.cores:
        os.sched_setaffinity(0, {devices.cores[rank]})
    torch.set_num_threads(1)
    keep_freed_memory()  # for every side of the comparison: `hetero` does it in any case
