"""How gradients are averaged over ranks, and backward passes that leave them unchanged if the loss count is 0."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.calls import Call
from lightning_hetero.exchange.failures import CollectiveErrors
from lightning_hetero.exchange.groups import RankGroup

Hook = Callable[[Any, Any], torch.futures.Future[Tensor]]
"""A DDP communication hook: takes its state and a gradient bucket, and returns the averaged gradients."""


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Each gradient of a backward pass inside goes through `hook`."""
    handles = [parameter.register_hook(hook) for parameter in module.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_unchanged(module: nn.Module, unless: Tensor | None = None) -> AbstractContextManager[None]:
    """A backward pass inside adds exact zeros to a module's gradients, unless the boolean tensor `unless` is true.

    A weight of 0 is not enough: the mean over an empty set is NaN, and so is 0 x NaN. The host never reads `unless`.
    """
    if unless is None:
        return _hooked(module, torch.zeros_like)
    return _hooked(module, lambda gradient: torch.where(unless, gradient, 0.0))


def without_nan(gradient: Tensor, counted: bool | Tensor) -> Tensor:
    """A gradient without the NaN of 0 x NaN that comes from a loss with a count of 0; all its other values are kept.

    If `counted`, the loss count is above 0 and the gradient is unchanged; the host never reads `counted` if a tensor.
    """
    if counted is True:
        return gradient
    finite = gradient.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(counted, gradient, finite) if isinstance(counted, Tensor) else finite


def gradients_without_nan(module: nn.Module, counted: bool | Tensor) -> AbstractContextManager[None]:
    """A backward pass inside adds gradients `without_nan`: what synchronized layers add from other ranks is kept."""
    return _hooked(module, lambda gradient: without_nan(gradient, counted))


def averaging_hook(errors: CollectiveErrors) -> Hook:
    """A hook that does what DDP does without one: average each bucket over all ranks.

    The error of a failed all-reduce, which autograd's engine raises later, is added to `errors`.
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


def timed_hook(hook: Hook, timer: ComputeTimer, *, may_wait: bool) -> Hook:
    """Wrap a DDP communication hook so that the timer records when the last local gradient is ready.

    DDP passes its buckets to the hook in order; at the last one, this rank has done its part of the backward pass. The
    time of a hook that `may_wait` for other ranks before it returns is not compute time.
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
    """Whether this rank's gradients count in the current backward pass, if only the device knows."""

    def __init__(self) -> None:
        self._keep: Tensor | None = None

    def current(self) -> Tensor | None:
        """A boolean tensor on the device; None for no mask."""
        return self._keep

    @contextmanager
    def applied(self, keep: Tensor) -> Iterator[None]:
        """A backward pass inside is masked."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None


def masked_hook(hook: Hook, mask: Callable[[], Tensor | None]) -> Hook:
    """Wrap a DDP communication hook so that this rank's gradients become exact zeros if its mask is false.

    A weight of 0 is not enough, see `gradients_unchanged`. The mask is a boolean tensor on the device, which the host
    never reads; None for no mask.
    """

    def kept(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        keep = mask()
        if keep is not None:
            bucket.buffer().masked_fill_(~keep, 0.0)
        return hook(state, bucket)

    return kept


_BUCKET_BYTES = 25 * 2**20
"""The default size of DDP's buckets: large enough to be fast, small compared with all gradients."""


def average_gradients(parameters: Sequence[nn.Parameter], group: RankGroup, call: Call | str) -> None:
    """Average gradients over all ranks as DDP does during backward, but after a purely local backward pass.

    A parameter without a gradient on this rank counts as zeros. One without a gradient on every rank is left unchanged,
    as in DDP with `find_unused_parameters`. All ranks must pass the same parameters, in the same order.
    `call` is how errors name it.
    """
    used = group.any_of([parameter.grad is not None for parameter in parameters], call)
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
