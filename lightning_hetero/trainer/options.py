"""The strategy's options, and checks before a run; each error is one sentence."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_hetero.planning.planner import check_global_batch
from lightning_hetero.planning.shares import Shares


@dataclass(frozen=True)
class Options:
    """The arguments of `HeteroStrategy`, see there.

    Raises:
        ValueError: an argument can't be used.
    """

    shares: Shares
    global_batch: int | None
    loss_count: Callable[[Any, Any], Any] | None
    memory_limit: float
    granularity: int

    def __post_init__(self) -> None:
        size, step = self.global_batch, self.granularity
        if size is not None and (isinstance(size, bool) or int(size) != size):
            raise ValueError(f"global_batch={size!r} has to be a whole number of samples, or None")
        if size is not None and size < 1:
            raise ValueError(f"global_batch={size} has to be at least 1 sample")
        if not math.isfinite(self.memory_limit) or self.memory_limit <= 0:
            raise ValueError(
                f"memory_limit={self.memory_limit!r} has to be a part of the device's memory such as 0.9, or a number "
                "of bytes"
            )
        if isinstance(step, bool) or int(step) != step or step < 1:
            raise ValueError(f"granularity={step!r} has to be a whole number of samples, at least 1")

    def check_world_size(self, world_size: int) -> None:
        """Check that the arguments fit the number of ranks.

        Raises:
            ValueError: they don't.
        """
        self.shares.check_world_size(world_size)
        if self.global_batch is not None:
            check_global_batch(self.global_batch, world_size)


def check_devices(devices: Sequence[torch.device]) -> str | None:
    """Check that the strategy supports these devices.

    Returns:
        A warning, or None.

    Raises:
        ValueError: it does not support one of them.
    """
    unsupported = sorted({device.type for device in devices} - {"cpu", "cuda"})
    if unsupported:
        raise ValueError(
            f"HeteroStrategy runs on CPUs and CUDA GPUs, not on {', '.join(unsupported)}: set accelerator='cpu'"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = sum(device.type == "cpu" for device in devices)
    if ranks > cores:
        return (
            f"{ranks} CPU ranks share {cores} core{'s' if cores > 1 else ''}: they slow each other down; use at most "
            "as many devices as there are cores"
        )
    return None


def check_trainable(module: nn.Module) -> None:
    """Check that there is something to train.

    Raises:
        ValueError: there isn't.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no trainable parameters, so there is no gradient to average")
