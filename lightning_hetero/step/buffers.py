"""What a module computes beside its parameters, on all ranks alike: merged now and then, never during a step.

DDP copies rank 0's buffers to all ranks before each forward pass. That costs every step, makes ranks wait inside of
forward, and throws away what the other ranks saw.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.batch_norm import own_modules, pooled
from lightning_hetero.step.loss_count import sample_count
from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm

Total = Callable[[Tensor], None]
"""Adds a tensor up over all ranks, in place."""


def broadcast_in_forward(options: Mapping[str, Any]) -> bool | None:
    """What the user's options of DDP say about copying rank 0's buffers before each forward pass; None for nothing."""
    for name in ("forward_sync_buffers", "broadcast_buffers"):  # DDP heeds the first of them
        if options.get(name) is not None:
            return bool(options[name])
    return None


def broadcast_apart(model: DistributedDataParallel, waiting: Callable[[], AbstractContextManager[None]]) -> None:
    """Let DDP's copying of rank 0's buffers be no part of a rank's own work: ranks wait for rank 0 there.

    Args:
        model: copies them within its forward pass.
        waiting: see `timing.ComputeTimer.waiting`.
    """
    copies = model._sync_buffers  # noqa: SLF001 - there is no public name for it

    def copies_apart() -> None:
        with waiting():
            copies()  # type: ignore[no-untyped-call]

    model._sync_buffers = copies_apart  # type: ignore[method-assign] # noqa: SLF001


def running_statistics(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers whose running statistics are each rank's own, each once; those not materialised left out."""
    found: dict[int, _BatchNorm] = {}
    for layer in own_modules(module):
        if (
            isinstance(layer, _BatchNorm)
            and not isinstance(layer, nn.SyncBatchNorm | SynchronizedBatchNorm)
            and isinstance(layer.running_mean, Tensor)
            and isinstance(layer.running_var, Tensor)
            and not isinstance(layer.running_mean, UninitializedBuffer)
        ):
            found[id(layer)] = layer
    return list(found.values())


def other_buffers(module: nn.Module) -> list[Tensor]:
    """All buffers but BatchNorm's, each once."""
    found = {
        id(buffer): buffer
        for layer in own_modules(module)
        if not isinstance(layer, _BatchNorm)
        for buffer in layer.buffers(recurse=False)
        if not isinstance(buffer, UninitializedBuffer) and buffer.layout == torch.strided and buffer.numel()
    }
    return list(found.values())


class BufferMerge:
    """Makes a module's buffers the same on all ranks, at points that all ranks reach.

    BatchNorm's running statistics are pooled (`batch_norm.pooled`), each rank's weighted by the samples that it has
    computed since the last merge. This is approximate in two ways: they are moving averages, in which late batches
    weigh more, while samples are counted alike; and each running variance is an average of unbiased variances, so the
    pooled one lies above that of all samples together, by a part of about 1 / (values per channel in a local batch).
    All other buffers become rank 0's, bit by bit. `num_batches_tracked` is left alone.

    Args:
        module: whose buffers.
        device: where the exchange takes place.
        rank: this rank.
        world_size: W.
        total: the exchange.
        waiting: entered while other ranks are waited for.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        total: Total,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._module = module
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._total = total
        self._waiting = waiting
        self._steps = 0
        self._samples = 0

    def count(self, share: Share | None, batch: Any) -> None:
        """One more training batch; all ranks call this equally often.

        Args:
            share: None where the user shards; then the samples are counted in the batch.
            batch: as the loader gave it.
        """
        self._steps += 1
        if share is not None:
            self._samples += share.counts[self._rank]  # 0 for a borrowed one, whose traces are wiped out
            return
        try:
            self._samples += sample_count(batch)
        except TypeError:
            self._samples += 1

    @torch.no_grad()
    def merge(self) -> None:
        """Make the buffers equal; talks to nobody where there was no training step since the last time.

        Raises:
            RuntimeError: the ranks have buffers of different sizes.
        """
        if not self._steps:
            return
        samples, self._steps, self._samples = self._samples, 0, 0
        if self._world_size == 1:
            return
        layers, others = running_statistics(self._module), other_buffers(self._module)
        own = torch.cat([_flat(buffer) for buffer in others]).to(self._device) if others else None
        statistics = [_statistics(layer) for layer in layers]
        means = [mean.to(self._device, torch.float64) for mean, _ in statistics]
        variances = [variance.to(self._device, torch.float64) for _, variance in statistics]
        head = torch.tensor([samples, 0 if own is None else own.numel()], dtype=torch.float64).to(self._device)
        # A row for each rank: adding zeros leaves it as it is, so a sum is a gather.
        table = torch.zeros(self._world_size, 2 + 2 * sum(map(len, means)), dtype=torch.float64, device=self._device)
        table[self._rank] = torch.cat([head, *means, *variances])
        with self._waiting():
            self._total(table)
        counts, sizes, rows = table[:, 0], table[:, 1], table[:, 2:]
        if len(set(sizes.tolist())) > 1:
            listed = ", ".join(f"{int(size)} on rank {rank}" for rank, size in enumerate(sizes.tolist()))
            raise RuntimeError(
                f"the module's buffers have different sizes on the ranks (bytes: {listed}); buffers must keep the same "
                "shape on every rank, or else be plain attributes"
            )
        if layers:
            pooled_means, pooled_variances = pooled(counts, *rows.chunk(2, dim=1))
            lengths = [len(mean) for mean in means]
            for (mean, variance), new_mean, new_variance in zip(
                statistics, pooled_means.split(lengths), pooled_variances.split(lengths), strict=True
            ):
                mean.copy_(new_mean)
                variance.copy_(new_variance)
        if own is not None:
            self._take_from_rank_0(others, own)

    def _take_from_rank_0(self, buffers: list[Tensor], own: Tensor) -> None:
        if self._rank:
            own.zero_()
        with self._waiting():
            self._total(own)  # of bytes, all of them rank 0's
        if self._rank:
            for buffer, part in zip(buffers, own.split([b.numel() * b.element_size() for b in buffers]), strict=True):
                # A copy begins where its type may begin; a slice of bytes need not.
                buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _flat(buffer: Tensor) -> Tensor:
    """The bytes of a buffer, in a tensor of their own."""
    return buffer.detach().contiguous().view(-1).view(torch.uint8)
