"""How gradients are averaged over the ranks, and backward passes that leave them alone where nothing counts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.failures import CollectiveErrors
from lightning_hetero.exchange.groups import RankGroup

Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]
"""A DDP communication hook: from its state and a gradient bucket to the averaged gradients."""


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A backward pass inside adds what `hook` makes of each gradient."""
    handles = [parameter.register_hook(hook) for parameter in module.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_left_alone(module: nn.Module, unless: Tensor | None = None) -> AbstractContextManager[None]:
    """A backward pass inside adds exact zeros to a module's gradients, unless a truth value on the device is true.

    Weight 0 is not enough: the mean over an empty set is NaN, and so is 0 x NaN. The host never reads the truth value.
    """
    if unless is None:
        return _hooked(module, torch.zeros_like)
    return _hooked(module, lambda gradient: torch.where(unless, gradient, 0.0))


def without_nan(gradient: Tensor, counts: bool | Tensor) -> Tensor:
    """A gradient without the NaN of 0 x NaN, which a loss of which nothing counts brings; all else in it is kept.

    Where something counts, the gradient stays as it is; the host never reads a tensor that says so.
    """
    if counts is True:
        return gradient
    finite = gradient.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(counts, gradient, finite) if isinstance(counts, Tensor) else finite


def gradients_without_nan(module: nn.Module, counts: bool | Tensor) -> AbstractContextManager[None]:
    """A backward pass inside adds gradients `without_nan`: what synchronized layers bring from other ranks is kept."""
    return _hooked(module, lambda gradient: without_nan(gradient, counts))


def averaging_hook(errors: CollectiveErrors) -> Hook:
    """What DDP does with a bucket when it has no hook, the mean over all ranks.

    `errors` get the error of a failed all-reduce, which autograd's engine raises later.
    """

    def allreduce_mean(group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        group = group if group is not None else dist.group.WORLD
        assert group is not None
        work = dist.all_reduce(bucket.buffer().div_(group.size()), group=group, async_op=True)
        assert work is not None

        def averaged(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            try:
                return done.value()[0]
            except RuntimeError as error:
                errors.add(error)
                raise

        future: torch.futures.Future[list[Tensor]] = work.get_future()
        return future.then(averaged)

    return allreduce_mean


def until_last_bucket(hook: Hook, timer: ComputeTimer, *, may_wait: bool) -> Hook:
    """Wrap a DDP communication hook so that the timer notes when the last local gradient is ready.

    DDP hands its buckets to the hook in order; with the last one this rank has done its part of the backward pass. A
    hook that `may_wait` for the other ranks before it returns takes no compute time.
    """

    def timed(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        if may_wait and bucket.is_last():
            timer.gradients_ready()
        with timer.waiting() if may_wait else nullcontext():
            future = hook(state, bucket)
        if not may_wait and bucket.is_last():
            timer.gradients_ready()
        return future

    return timed


class GradientMask:
    """Whether this rank's gradients count in the backward pass at hand, where only the device knows."""

    def __init__(self) -> None:
        self._keep: Tensor | None = None

    def current(self) -> Tensor | None:
        """A truth value on the device; None for no mask."""
        return self._keep

    @contextmanager
    def applied(self, keep: Tensor) -> Iterator[None]:
        """A backward pass inside is masked."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None


def masked(hook: Hook, mask: Callable[[], Tensor | None]) -> Hook:
    """Wrap a DDP communication hook so that this rank's gradients are exact zeros where its mask is false.

    Weight 0 is not enough, as in `gradients_left_alone`. A mask is a truth value on the device, which the host never
    reads; None is for no mask.
    """

    def kept(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        keep = mask()
        if keep is not None:
            bucket.buffer().masked_fill_(~keep, 0.0)
        return hook(state, bucket)

    return kept


_BUCKET_BYTES = 25 * 2**20
"""As large as DDP's buckets: large enough to be quick, small compared with all gradients."""


def average_gradients(parameters: Sequence[nn.Parameter], group: RankGroup) -> None:
    """What DDP does in a backward pass, after one that was purely local: the mean over all ranks.

    A parameter without gradient on this rank counts as zeros. One without gradient on all ranks is left as it is, as
    under DDP with `find_unused_parameters`. All ranks give the same parameters, in the same order.
    """
    used = group.any_of([parameter.grad is not None for parameter in parameters])
    bucket: list[Tensor] = []
    for parameter in compress(parameters, used):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        same = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not same or sum(gradient.nbytes for gradient in bucket) + parameter.nbytes > _BUCKET_BYTES):
            _average(bucket, group.world_size)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _average(bucket, group.world_size)


@torch.no_grad()
def _average(gradients: Sequence[Tensor], world_size: int) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(world_size)
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
