"""What a process keeps from run to run: its process group, its timer, its limits, and what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch

from lightning_hetero.device.allocator import keep_freed_memory
from lightning_hetero.device.memory import memory_capacity, memory_limits
from lightning_hetero.device.name import device_name
from lightning_hetero.device.step_timer import ComputeTimer, device_clock
from lightning_hetero.exchange.failures import CollectiveErrors
from lightning_hetero.exchange.groups import RankGroup, all_reduce_in_own_group
from lightning_hetero.exchange.store import default_store
from lightning_hetero.exchange.waits import Waits
from lightning_hetero.planning.memory import MemoryLimits
from lightning_hetero.step.gradients import GradientMask
from lightning_hetero.step.sync_batch_norm import BatchNormGroup
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.options import Options
from lightning_hetero.trainer.planner_cache import PlannerCache
from lightning_hetero.trainer.profiles import ProfileStore


class BatchCounter:
    """Numbers the global batches that are trained on, from 0 over all runs of the job."""

    def __init__(self) -> None:
        self._begun = 0

    def next_step(self) -> int:
        """The number of the next global batch: how many have begun so far."""
        return self._begun

    def begin(self) -> int:
        """A global batch begins; returns its number."""
        self._begun += 1
        return self._begun - 1


@dataclass(frozen=True)
class Job:
    """What one process, which drives one device, has for all of its runs.

    Attributes:
        options: the strategy's options.
        group: all ranks, for every exchange but that of gradients.
        device: of this rank.
        devices: W names, one per rank.
        timer: measures this rank's compute time.
        mask: of the gradients that DDP averages.
        gradient_errors: errors of the collectives that average gradients.
        memory: the bytes that each rank may use.
        profiles: loads and saves profiles.
        planner_cache: keeps the planner of the training data.
        evaluation: decides how evaluations are split.
        lockstep_group: the process group for the training loader of an iterable data set, by the loader's position.
            A group takes sockets and threads, so each is made once; all ranks have to call this together.
        batch_norm_group: for synchronized BatchNorm layers; None where each rank computes its own statistics.
        batches: numbers the training batches.
    """

    options: Options
    group: RankGroup
    device: torch.device
    devices: tuple[str, ...]
    timer: ComputeTimer
    mask: GradientMask
    gradient_errors: CollectiveErrors
    memory: MemoryLimits
    profiles: ProfileStore
    planner_cache: PlannerCache
    evaluation: EvaluationBalancer
    lockstep_group: Callable[[int], RankGroup]
    batch_norm_group: BatchNormGroup | None
    batches: BatchCounter

    @classmethod
    def start(
        cls,
        options: Options,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout: timedelta | None,
        *,
        sync_batch_norm: bool,
        current_hook: Callable[[], str | None],
    ) -> "Job":
        """Connect to the other ranks, and exchange devices and memory with them; all ranks call it together.

        `current_hook` returns the hook of the user's code that is running, for errors.
        """
        if device.type == "cpu":
            keep_freed_memory()
        timer = ComputeTimer(device_clock(device))
        waits = Waits(rank, world_size, device_name(device), default_store(), timeout, current_hook=current_hook)
        group = RankGroup(rank, world_size, timeout, waits)
        devices = tuple(group.gather(device_name(device)))
        planner_cache = PlannerCache()
        batch_norm_group = None
        if sync_batch_norm and world_size > 1:
            all_reduce = all_reduce_in_own_group(timeout, waits, "a synchronized BatchNorm layer")
            batch_norm_group = BatchNormGroup(rank, world_size, all_reduce, timer.waiting)
        capacities = group.gather(memory_capacity(device))
        return cls(
            options=options,
            group=group,
            device=device,
            devices=devices,
            timer=timer,
            mask=GradientMask(),
            gradient_errors=CollectiveErrors(),
            memory=MemoryLimits(memory_limits(capacities, options.memory_limit), devices),
            profiles=ProfileStore(group, device),
            planner_cache=planner_cache,
            evaluation=EvaluationBalancer(world_size, timer, options.shares, planner_cache),
            lockstep_group=cache(lambda position: RankGroup(rank, world_size, timeout, waits, f"loader {position}")),
            batch_norm_group=batch_norm_group,
            batches=BatchCounter(),
        )

    @property
    def place(self) -> str:
        """Rank and device, for messages."""
        return f"rank {self.group.rank} ({self.devices[self.group.rank]})"

    @property
    def on_cpus(self) -> bool:
        """Whether all ranks run on CPUs, where the time of a step is known as soon as it ends."""
        return set(self.devices) == {"cpu"}
