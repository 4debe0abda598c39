"""What a process keeps from run to run: its place among the ranks, its clock, its limits, and what was measured."""

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
from lightning_hetero.planning.memory import MemoryLimits
from lightning_hetero.step.gradients import GradientMask
from lightning_hetero.step.sync_batch_norm import BatchNormGroup
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.options import Options
from lightning_hetero.trainer.planners import Planners
from lightning_hetero.trainer.profiles import ProfileStore


class BatchCounter:
    """Numbers the global batches that are trained on, from 0 over all runs of the job."""

    def __init__(self) -> None:
        self._begun = 0

    def next_step(self) -> int:
        """The number of the next global batch, which is how many were begun."""
        return self._begun

    def begin(self) -> int:
        """A global batch begins; returns its number."""
        self._begun += 1
        return self._begun - 1


@dataclass(frozen=True)
class Job:
    """A process that drives one device, together with those of the other ranks.

    Attributes:
        options: of the strategy.
        group: of all ranks, for everything but gradients.
        device: of this rank.
        devices: W names.
        timer: runs while this rank computes.
        mask: of the gradients that DDP averages.
        gradient_errors: of the collective calls that average them.
        memory: what each rank may hold.
        profiles: of earlier runs.
        planners: the planner of the training data.
        evaluation: how evaluations are split.
        lockstep_group: of the training loader of an iterable data set, by its position among those that are trained on
            together. It takes sockets and threads, so it is made once; all ranks have to ask for it together.
        batch_norm_group: of synchronized layers; None where BatchNorm is each rank's own.
        batches: training batches so far.
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
    planners: Planners
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
    ) -> "Job":
        """Meet the other ranks, and tell each other what devices there are; all ranks call it together."""
        if device.type == "cpu":
            keep_freed_memory()
        timer = ComputeTimer(device_clock(device))
        group = RankGroup(rank, world_size, timeout)
        devices = tuple(group.gather(device_name(device)))
        planners = Planners()
        layers = None
        if sync_batch_norm and world_size > 1:
            layers = BatchNormGroup(rank, world_size, all_reduce_in_own_group(timeout), timer.waiting)
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
            planners=planners,
            evaluation=EvaluationBalancer(group, device_clock(device), options.shares, planners),
            lockstep_group=cache(lambda _position: RankGroup(rank, world_size, timeout)),
            batch_norm_group=layers,
            batches=BatchCounter(),
        )

    @property
    def place(self) -> str:
        """Rank and device, for messages."""
        return f"rank {self.group.rank} ({self.devices[self.group.rank]})"

    @property
    def on_cpus(self) -> bool:
        """Whether all ranks are CPUs: they know what a step has taken them as soon as it is over."""
        return set(self.devices) == {"cpu"}
