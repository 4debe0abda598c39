"""One training step of a rank: its batch is counted, its loss is weighted, what borrowed samples changed is undone."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.groups import PendingMessages, RankGroup
from lightning_hetero.exchange.long_backward import LongBackwardMonitor
from lightning_hetero.exchange.messages import StepMessages
from lightning_hetero.sampling.random_state import RandomState
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.gradients import (
    GradientMask,
    average_gradients,
    gradients_left_alone,
    gradients_without_nan,
)
from lightning_hetero.step.loss_count import LossCounter
from lightning_hetero.step.loss_weight import loss_weight
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.step.sync_batch_norm import BatchNormGroup
from lightning_hetero.step.zero_count import ZeroCountWarning


@dataclass(frozen=True)
class StepContext:
    """What all training steps of a fit have in common.

    Attributes:
        module: the LightningModule.
        counter: its loss counts.
        group: of all ranks.
        device: of this rank.
        timer: runs while this rank computes.
        mask: of the gradients that DDP averages.
        long_backward: lets the other ranks know of a long backward pass.
        zero_counts: warns of global batches in which nothing counts.
        batch_norm_group: of the synchronized layers; None where there are none.
    """

    module: nn.Module
    counter: LossCounter
    group: RankGroup
    device: torch.device
    timer: ComputeTimer
    mask: GradientMask
    long_backward: LongBackwardMonitor
    zero_counts: ZeroCountWarning
    batch_norm_group: BatchNormGroup | None

    @property
    def counts_on_device(self) -> bool:
        """Whether loss counts stay on the device; the host would wait for a GPU to read them."""
        return self.device.type == "cuda"


class LoadedBatch:
    """A rank's batch as it was loaded: nothing of the user's code has seen it yet.

    Borrowed samples must leave no trace on this rank, so what they may change is saved here.

    Args:
        step: the global batch.
        share: of this rank; None where the user shards.
        rank: this rank.
        module: the LightningModule.
    """

    def __init__(self, step: int, share: Share | None, rank: int, module: nn.Module) -> None:
        self.step = step
        self.share = share
        self.borrowed = share is not None and share.borrowed
        self.local_batch = share.counts[rank] if share is not None else None
        """Samples of this rank, 0 if they are borrowed; None where the user shards."""
        self._saved: tuple[ModuleSnapshot, RandomState] | None = None
        if share is not None and share.borrowed:
            self._saved = ModuleSnapshot(module), share.random_state or RandomState.current()

    def undo_borrowed(self) -> None:
        """Put back what borrowed samples have changed."""
        if self._saved is not None:
            for state in self._saved:
                state.restore()


@dataclass(frozen=True)
class LocalCount:
    """What a rank's batch counts for.

    Attributes:
        value: the loss count; where it is a tensor on a CUDA device, the host never reads it.
        error: what counting has raised: all ranks learn of it by a count that is none, and this one raises it then.
    """

    value: float | Tensor
    error: Exception | None = None

    @classmethod
    def of(cls, context: StepContext, batch: Any, loaded: LoadedBatch) -> Self:
        """Count a batch as `training_step` gets it; borrowed samples count nothing."""
        if loaded.borrowed:
            return cls(0.0)
        try:
            value = context.counter(context.module, batch, loaded.local_batch or None)
        except Exception as error:  # noqa: BLE001 - whatever the user's rule raises has to reach the other ranks
            return cls(float("nan"), error)
        on_device = isinstance(value, Tensor) and context.counts_on_device
        return cls(value if on_device else float(value))

    @property
    def on_host(self) -> float:
        """The count as the host knows it; 1 stands for one that only the device knows."""
        return 1.0 if isinstance(self.value, Tensor) else self.value

    @property
    def is_zero(self) -> bool:
        """Whether the host knows that nothing counts."""
        return self.on_host == 0

    @property
    def is_positive(self) -> bool | Tensor:
        """Whether something counts; on the device where only that knows."""
        return self.value > 0 if isinstance(self.value, Tensor) else self.value != 0

    @property
    def on_device(self) -> Tensor | None:
        """The count where only the device knows it."""
        return self.value if isinstance(self.value, Tensor) else None


class DeviceTotal:
    """Loss counts added up over all ranks on the device: to read them would make the host wait for it.

    Args:
        count: of this rank.
        context: of the fit.
    """

    def __init__(self, count: LocalCount, context: StepContext) -> None:
        self._own = torch.as_tensor(count.value, dtype=torch.float64).to(context.device, non_blocking=True)
        self._world_size = context.group.world_size
        self.total = self._own.clone()
        self._work = dist.all_reduce(self.total, async_op=True) if self._world_size > 1 else None

    def wait(self) -> None:
        """Order the device's streams, so that the device waits here; the host goes on."""
        if self._work is not None:
            self._work.wait()

    def weight(self) -> Tensor:
        """The weight of this rank's loss, see `loss_weight`."""
        return torch.where(self.total > 0, self._world_size * self._own / self.total, 0.0)


class Step:
    """A training step of this rank, from the call of `training_step` to the end of the batch.

    Args:
        context: of the fit.
        loaded: the batch.
        count: what it counts for.
        messages: of all ranks, on their way.
        accumulates: gradients of earlier micro-batches of the same optimizer step are there.
    """

    def __init__(
        self,
        context: StepContext,
        loaded: LoadedBatch,
        count: LocalCount,
        messages: PendingMessages,
        *,
        accumulates: bool,
    ) -> None:
        self._context = context
        self.loaded = loaded
        self.count = count
        self._accumulates = accumulates
        self._pending: PendingMessages | None = messages
        self._device_total = DeviceTotal(count, context) if context.counts_on_device else None
        self.weight: float | Tensor = 1.0
        """The factor on this rank's loss; known once messages are received."""
        self.logged_weight: float | Tensor | None = None
        """What its loss weighs where it is logged, in samples of the global batch; None: as much as its samples."""

    def receive(self) -> StepMessages | None:
        """Wait for the messages of all ranks, from which this rank's weight follows; None where that was done before.

        Raises:
            RuntimeError, ValueError: see `StepMessages.check`; or what counting the batch raised on this rank.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        context = self._context
        with context.timer.waiting():
            messages = pending.wait(lambda: context.long_backward.check_others(self.loaded.step))
            if self._device_total is not None:
                self._device_total.wait()
        if self.count.error is not None:
            raise self.count.error
        messages.check()
        if self._device_total is not None:
            context.zero_counts.check_on_device(self._device_total.total)
            self.weight = self._device_total.weight()
        else:
            context.zero_counts.check(self.loaded.step, float(messages.loss_counts.sum()))
            self.weight = loss_weight(messages.loss_counts, context.group.rank)
        self.logged_weight = self._logged_weight(messages)
        return messages

    def _logged_weight(self, messages: StepMessages) -> float | Tensor | None:
        share = self.loaded.share
        if share is None:
            return self.count.value
        if self.count.on_device is None and tuple(messages.loss_counts.tolist()) == tuple(share.counts):
            return None
        return self.weight * sum(share.counts) / self._context.group.world_size

    @contextmanager
    def weighted(self, loss: Tensor, *, averaged: bool, keeps_gradients: bool) -> Iterator[Tensor]:
        """The loss to go backward from; gradients of a batch in which nothing counts are left alone meanwhile.

        Args:
            loss: the user's.
            averaged: the backward pass inside waits for those of the other ranks.
            keeps_gradients: gradients may hold those of earlier backward passes of the same step.
        """
        context, positive = self._context, self.count.is_positive
        # Samples of which nothing counts take part in synchronized statistics: their gradients are not zero there.
        layers = context.batch_norm_group if not self.loaded.borrowed and positive is not True else None
        # A mask of buckets would wipe out the gradients of earlier micro-batches, which they hold too.
        masked = averaged and not keeps_gradients and not self._accumulates
        with ExitStack() as hooks:
            hooks.callback(context.timer.backward_over)
            if averaged:
                hooks.enter_context(_watched(context.long_backward, self.loaded.step))
            if layers is not None:
                hooks.enter_context(layers.backward_pass(positive))
                hooks.enter_context(gradients_without_nan(context.module, positive))
            elif self.count.is_zero:
                hooks.enter_context(gradients_left_alone(context.module))
            elif isinstance(positive, Tensor) and masked:
                hooks.enter_context(context.mask.applied(positive))
            elif isinstance(positive, Tensor):
                hooks.enter_context(gradients_left_alone(context.module, unless=positive))
            if isinstance(self.weight, Tensor):
                loss = loss * self.weight.to(loss.dtype)
            elif self.weight != 1.0 and (layers is not None or not self.count.is_zero):  # else only its graph matters
                loss = loss * self.weight
            yield loss

    def part_of_global_loss(self, loss: Tensor) -> Tensor:
        """What this rank's loss adds to the mean over all ranks that is the loss of the global batch."""
        part = loss.detach() * self.weight
        return torch.where(torch.as_tensor(self.count.is_positive, device=part.device), part, torch.zeros_like(part))

    def average_after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """The mean of the gradients over all ranks, after backward passes that each rank made by itself."""
        context = self._context
        context.timer.gradients_ready()  # it runs again when the backward pass is over
        with _watched(context.long_backward, self.loaded.step):
            average_gradients(parameters, context.group)


@contextmanager
def _watched(monitor: LongBackwardMonitor, step: int) -> Iterator[None]:
    """A backward pass that is averaged over all ranks happens inside."""
    monitor.enter(step)
    try:
        yield
    finally:
        monitor.leave()
