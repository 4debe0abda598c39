"""BatchNorm over the samples of all ranks, exact however unevenly they are split."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_hetero.exchange.groups import gather_rows
from lightning_hetero.step.batch_norm import modules_without_metrics, pooled_statistics
from lightning_hetero.step.gradients import without_nan


class BatchNormGroup:
    """What the synchronized layers of a rank share: the exchange with the other ranks, and the state of the step.

    `all_reduce_sum` sums a tensor over all ranks, in place, in a process group that nothing else uses; `waiting` is
    entered while this rank waits for others.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        all_reduce_sum: Callable[[Tensor], None] = lambda _: None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._all_reduce_sum = all_reduce_sum
        self._waiting = waiting
        self._borrowed = False
        self._counted: bool | Tensor = True

    def begin_step(self, *, borrowed: bool) -> None:
        """Begin a training step; borrowed samples, which belong to other ranks, count for nothing on this one."""
        self._borrowed = borrowed

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        with self._waiting():
            self._all_reduce_sum(tensor)

    def gather_statistics(self, row: Tensor) -> Tensor:
        """The rows of all ranks, (W, columns), from this rank's, (columns,); zeros while its samples are borrowed."""
        row = torch.zeros_like(row) if self._borrowed else row  # (columns,)
        return gather_rows(row, self.rank, self.world_size, self.all_reduce_sum)

    @contextmanager
    def backward_pass(self, counted: bool | Tensor) -> Iterator[None]:
        """A backward pass inside is of a loss with a count above 0 if `counted`; the host never reads a tensor."""
        self._counted = counted
        try:
            yield
        finally:
            self._counted = True

    def counted_gradient(self, gradient: Tensor) -> Tensor:
        """The part of a gradient that counts: zeros for borrowed samples; without NaN if the loss has a count of 0."""
        return torch.zeros_like(gradient) if self._borrowed else without_nan(gradient, self._counted)

    def __deepcopy__(self, _: Any) -> "BatchNormGroup":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchNormGroup, ()  # the copy in another process has no process group


class _Normalize(torch.autograd.Function):
    """Normalize by the statistics of all ranks; one exchange forward, one backward.

    Let J be the sum of the ranks' weighted losses. A value of rank r changes the statistics, and thereby the outputs of
    all ranks. So its gradient contains plain sums over ranks of `dJ/dy` and of `dJ/dy · x̂`, where each rank's `dJ/dy`
    already includes that rank's weight, and N is the number of values on all ranks:
    `dJ/dx = γ / σ · (dJ/dy - Σ dJ/dy / N - x̂ · Σ (dJ/dy · x̂) / N)`. Weight and bias get only this rank's part, since
    DDP averages their gradients over ranks, like those of all other parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, batch_norm_group: BatchNormGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(y, mean, biased variance, N)`, the last three in double precision, the same on all ranks."""
        channels, dims = x.shape[1], [0, *range(2, x.ndim)]
        values = x if x.dtype == torch.float64 else x.float()
        row = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)  # (1 + 2C,)
        if x.numel():
            row[0] = x.numel() // channels
            row[1 + channels :], row[1 : 1 + channels] = torch.var_mean(values, dims, correction=0)
        table = batch_norm_group.gather_statistics(row)  # (W, 1 + 2C)
        count = table[:, 0].sum()
        if x.device.type == "cpu" and count <= 1:  # not checked on a GPU, since the host would have to wait for it
            raise ValueError(
                f"BatchNorm needs more than 1 value per channel in training; all ranks together have {count:g}: raise "
                "the global batch"
            )
        mean, variance = pooled_statistics(table[:, 0], *table[:, 1:].chunk(2, dim=1))  # (C,)
        shape = [1, channels, *[1] * (x.ndim - 2)]
        center, inverse = mean.to(values.dtype).view(shape), (variance + eps).rsqrt().to(values.dtype).view(shape)
        normal = (values - center) * inverse
        if weight is not None:
            normal = normal * weight.to(values.dtype).view(shape)
        if bias is not None:
            normal = normal + bias.to(values.dtype).view(shape)
        ctx.save_for_backward(x, weight, bias, center, inverse, count)
        ctx.batch_norm_group = batch_norm_group
        ctx.mark_non_differentiable(mean, variance, count)
        return normal.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, bias, center, inverse, count = ctx.saved_tensors
        dims = [0, *range(2, x.ndim)]
        gradient = ctx.batch_norm_group.counted_gradient(gradient.to(center.dtype))
        normal = (x.to(center.dtype) - center) * inverse
        sums = torch.stack([gradient.sum(dims), (gradient * normal).sum(dims)])  # (2, C)
        for_x = None
        if ctx.needs_input_grad[0]:
            total = sums.to(torch.float64, copy=True)
            ctx.batch_norm_group.all_reduce_sum(total)
            first, second = (total / count).to(center.dtype).view(2, *center.shape)
            scale = inverse if weight is None else inverse * weight.to(center.dtype).view(center.shape)
            for_x = (scale * (gradient - first - normal * second)).to(x.dtype)
        for_weight = sums[1].to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        for_bias = sums[0].to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        return for_x, for_weight, for_bias, None, None


class SynchronizedBatchNorm(_BatchNorm):
    """BatchNorm over the samples of all ranks; `convert_sync_batchnorm` turns BatchNorm layers into it.

    Output, gradients and running statistics are those of a single process with the whole global batch. A rank may have
    no samples, or borrowed ones, which count for nothing. The host never waits for a GPU.
    """

    batch_norm_group: BatchNormGroup
    original: type[_BatchNorm]

    def _check_input_dim(self, input: Tensor) -> None:
        if self.original is not nn.SyncBatchNorm:
            self.original._check_input_dim(self, input)  # noqa: SLF001 - the check of its original class
        elif input.ndim < 2:
            raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.batch_norm_group.world_size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        output: Tensor
        output, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.batch_norm_group)
        if self.track_running_stats:
            self._update_running_statistics(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # momentum=None means the plain mean over all steps; a tensor, because reading it would wait for the device.
        factor = self.momentum if self.momentum is not None else 1.0 / self.num_batches_tracked.double()
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(running.double() * (1 - factor) + now * factor)


def convert_sync_batchnorm(module: nn.Module, batch_norm_group: BatchNormGroup) -> None:
    """Turn all BatchNorm layers of a module into synchronized ones, in place: parameters, buffers and hooks stay.

    Layers with a process group of their own, and torchmetrics, are left unchanged.

    Raises:
        ValueError: a lazy layer has not been initialized by a first batch.
    """
    for layer in modules_without_metrics(module):
        if not isinstance(layer, _BatchNorm) or isinstance(layer, SynchronizedBatchNorm):
            continue
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(
                f"sync_batchnorm=True: a {type(layer).__name__} has not seen a batch yet; run one in configure_model"
            )
        if getattr(layer, "process_group", None) is None:
            layer.batch_norm_group, layer.original = batch_norm_group, type(layer)  # type: ignore[assignment] # mypy thinks these are submodules
            layer.__class__ = SynchronizedBatchNorm


def revert_sync_batchnorm(module: nn.Module) -> None:
    """Give the layers their original classes again."""
    for layer in modules_without_metrics(module):
        if isinstance(layer, SynchronizedBatchNorm):
            layer.__class__ = layer.original  # type: ignore[assignment] # a class known only at run time
            del layer.batch_norm_group, layer.original
