"""Makes a module's buffers the same on all ranks, between steps and never during one.

DDP copies rank 0's buffers to all ranks before each forward pass. That costs time in every step, makes ranks wait in
the forward pass, and discards what the other ranks have computed.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from lightning_hetero.exchange.groups import RankGroup, all_reduce_sum, gather_rows
from lightning_hetero.step.batch_norm import modules_without_metrics, pooled_statistics
from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm


def broadcast_in_forward(options: Mapping[str, Any]) -> bool | None:
    """Whether the user's DDP options broadcast rank 0's buffers before each forward pass; None if not specified."""
    values = (options.get(name) for name in ("forward_sync_buffers", "broadcast_buffers"))  # as in DDP: the first wins
    return next((bool(value) for value in values if value is not None), None)


def set_broadcast(
    model: DistributedDataParallel, options: Mapping[str, Any], waiting: Callable[[], AbstractContextManager[None]]
) -> None:
    """Let a wrapper not broadcast rank 0's buffers, unless the user's DDP options ask for it.

    It is then excluded from compute time, since the other ranks wait for rank 0 there.
    """
    broadcasts = broadcast_in_forward(options)
    if broadcasts is None:
        # Set after construction, where older versions of torch would also skip the copy at the start.
        model.broadcast_buffers = False
    if not broadcasts:
        return
    broadcast = model._sync_buffers  # noqa: SLF001 - there is no public name for it

    def timed_broadcast() -> None:
        with waiting():
            broadcast()  # type: ignore[no-untyped-call] # torch has no types for it

    model._sync_buffers = timed_broadcast  # type: ignore[method-assign] # noqa: SLF001 - for this model only


def running_statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running mean and variance of each initialized BatchNorm layer that is not synchronized."""
    found = {
        layer: (layer.running_mean, layer.running_var)
        for layer in modules_without_metrics(module)
        if isinstance(layer, _BatchNorm)
        and not isinstance(layer, nn.SyncBatchNorm | SynchronizedBatchNorm)
        and isinstance(layer.running_mean, Tensor)
        and isinstance(layer.running_var, Tensor)
        and not isinstance(layer.running_mean, UninitializedBuffer)
    }
    return list(found.values())


def other_buffers(module: nn.Module) -> list[Tensor]:
    """All buffers except BatchNorm's, each once."""
    found = {
        id(buffer): buffer
        for layer in modules_without_metrics(module)
        if not isinstance(layer, _BatchNorm)
        for buffer in layer.buffers(recurse=False)
        if not isinstance(buffer, UninitializedBuffer) and buffer.layout == torch.strided and buffer.numel()
    }
    return list(found.values())


class BufferMerge:
    """Makes a module's buffers the same on all ranks, at points that all ranks reach.

    BatchNorm's running statistics are pooled (`pooled_statistics`), each rank's weighted by the samples that it has
    computed since the last merge. This is approximate in two ways: they are moving averages, in which later batches
    weigh more, while all samples count equally; and each running variance is an average of unbiased variances, so the
    pooled one exceeds that of all samples together by a fraction of about 1 / (values per channel in a local batch).
    All other buffers become bitwise copies of rank 0's. `num_batches_tracked` is left unchanged. The exchange takes
    place on `device`, and `waiting` is entered while this rank waits for others.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._module = module
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._waiting = waiting
        self._steps = 0  # since the last merge
        self._samples = 0  # computed by this rank in these steps

    def add_batch(self, samples: int) -> None:
        """Count a training batch; borrowed samples count 0. All ranks must call this equally often."""
        self._steps += 1
        self._samples += samples

    @property
    def is_due(self) -> bool:
        """Whether `merge` exchanges anything; the same on all ranks."""
        return self._steps > 0 and self._world_size > 1

    @torch.no_grad()
    def merge(self) -> None:
        """Make the buffers equal on all ranks; does nothing if there was no training step since the last merge.

        Raises:
            RuntimeError: the ranks have buffers of different sizes.
        """
        if not self._steps:
            return
        samples, self._steps, self._samples = self._samples, 0, 0
        if self._world_size == 1:
            return
        statistics = running_statistics(self._module)
        others = other_buffers(self._module)
        flat = _flat(others, self._device)  # (bytes,)
        row = [torch.tensor([samples, len(flat)]), *(mean for mean, _ in statistics), *(var for _, var in statistics)]
        with self._waiting():
            own = torch.cat([part.to(self._device, torch.float64) for part in row])  # (2 + 2 * channels,)
            table = gather_rows(own, self._rank, self._world_size, all_reduce_sum)  # (W, 2 + 2 * channels)
        _check_sizes(table[:, 1].tolist())
        if statistics:
            mean, variance = pooled_statistics(table[:, 0], *table[:, 2:].chunk(2, dim=1))  # (channels,) each
            lengths = [len(mean) for mean, _ in statistics]
            pooled = zip(mean.split(lengths), variance.split(lengths), strict=True)
            for buffers, values in zip(statistics, pooled, strict=True):
                for buffer, value in zip(buffers, values, strict=True):
                    buffer.copy_(value)
        if others:
            with self._waiting():
                dist.broadcast(flat, src=0)
            if self._rank:
                _fill(others, flat)


@torch.no_grad()
def follow_steps(
    module: nn.Module,
    source: int,
    group: RankGroup,
    device: torch.device,
    waiting: Callable[[], AbstractContextManager[None]],
    *,
    follows: bool,
) -> None:
    """After a step in which ranks had no samples of their own, give their buffers what the step has made of them.

    A rank that computed borrowed samples has put its buffers back. Those that follow the steps and not the data, such
    as counters, would then stay behind; so all but BatchNorm's statistics are taken from a rank with samples.

    Args:
        module: the user's.
        source: a rank that had samples.
        group: all ranks, which call this together.
        device: where buffers are exchanged.
        waiting: entered while this rank waits for others.
        follows: whether this rank had no samples.

    Raises:
        RuntimeError: the ranks have buffers of different sizes.
    """
    buffers = other_buffers(module)
    buffers += [
        layer.num_batches_tracked
        for layer in modules_without_metrics(module)
        if isinstance(layer, _BatchNorm) and isinstance(layer.num_batches_tracked, Tensor)
    ]
    if not buffers:
        return
    flat = _flat(buffers, device)  # (bytes,)
    with waiting():
        _check_sizes(group.start([len(flat)]).wait()[:, 0].tolist())
        dist.broadcast(flat, src=source)
    if follows:
        _fill(buffers, flat)


def _flat(buffers: list[Tensor], device: torch.device) -> Tensor:
    """The bytes of buffers, one after the other, on a device."""
    parts = [buffer.detach().contiguous().view(-1).view(torch.uint8) for buffer in buffers]
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)).to(device)


def _check_sizes(sizes: list[float]) -> None:
    if len(set(sizes)) > 1:
        listed = ", ".join(f"{int(size)} on rank {rank}" for rank, size in enumerate(sizes))
        raise RuntimeError(
            f"the module's buffers have different sizes on the ranks (bytes: {listed}); buffers must keep the same "
            "shape on every rank, or be plain attributes instead"
        )


def _fill(buffers: list[Tensor], flat: Tensor) -> None:
    """Fill buffers with their bytes, one after the other."""
    for buffer, part in zip(buffers, flat.split([buffer.nbytes for buffer in buffers]), strict=True):
        # A cloned tensor is aligned for any dtype; a slice of bytes need not be.
        buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))
