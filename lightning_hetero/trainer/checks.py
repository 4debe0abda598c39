"""What the strategy can't do, said at the start in one sentence each."""

import math
import os
from collections.abc import Sequence

import torch
from torch import nn

from lightning_hetero.planning.planner import check_global_batch
from lightning_hetero.planning.shares import Shares


def check_options(global_batch: int | None, memory_limit: float, granularity: int) -> None:
    """See that a strategy can be made of its arguments.

    Raises:
        ValueError: it can't.
    """
    if global_batch is not None and (isinstance(global_batch, bool) or int(global_batch) != global_batch):
        raise ValueError(f"global_batch={global_batch!r} has to be a whole number of samples, or None")
    if global_batch is not None and global_batch < 1:
        raise ValueError(f"global_batch={global_batch} has to be at least 1 sample")
    if not math.isfinite(memory_limit) or memory_limit <= 0:
        raise ValueError(
            f"memory_limit={memory_limit!r} has to be a part of the device's memory such as 0.9, or a number of bytes"
        )
    if isinstance(granularity, bool) or int(granularity) != granularity or granularity < 1:
        raise ValueError(f"granularity={granularity!r} has to be a whole number of samples, at least 1")


def check_job(shares: Shares, global_batch: int | None, world_size: int) -> None:
    """See that the arguments fit the number of ranks.

    Raises:
        ValueError: they don't.
    """
    shares.check_world_size(world_size)
    if global_batch is not None:
        check_global_batch(global_batch, world_size)


def check_devices(devices: Sequence[torch.device]) -> str | None:
    """See that these devices can be driven.

    Returns:
        A warning, or None.

    Raises:
        ValueError: they can't.
    """
    unable = sorted({device.type for device in devices} - {"cpu", "cuda"})
    if unable:
        raise ValueError(
            f"HeteroStrategy runs on CPUs and CUDA GPUs, not on {', '.join(unable)}: set accelerator='cpu'"
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
    """See that there is something to train.

    Raises:
        ValueError: there isn't.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no trainable parameters, so there is no gradient to average")
