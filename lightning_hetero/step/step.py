"""One training step of a rank: count its batch, weight its loss, undo the side effects of borrowed samples."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.calls import BACKWARD_PASS, Call
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.exchange.messages import PendingMessages, StepMessages
from lightning_hetero.sampling.random_state import RandomState
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.gradients import (
    GradientMask,
    average_gradients,
    gradients_unchanged,
    gradients_without_nan,
)
from lightning_hetero.step.loss_count import LossCounter, loss_weight
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.step.sync_batch_norm import BatchNormGroup
from lightning_hetero.step.zero_count import ZeroCountWarning


@dataclass(frozen=True)
class StepContext:
    """What all training steps of a fit have in common."""

    module: nn.Module
    counter: LossCounter
    group: RankGroup
    device: torch.device  # of this rank
    timer: ComputeTimer  # of this rank's compute time
    mask: GradientMask  # for the gradients that DDP averages
    zero_counts: ZeroCountWarning
    batch_norm_group: BatchNormGroup | None  # of the synchronized layers; None if there are none

    @property
    def counts_on_device(self) -> bool:
        """Whether loss counts stay on the device; to read them, the host would have to wait for the GPU."""
        return self.device.type == "cuda"


class LoadedBatch:
    """A rank's batch as it was loaded, before any of the user's code has seen it.

    Borrowed samples must have no side effects on this rank, so the state that they may change is saved here.

    Args:
        step: the number of the global batch.
        share: None if no plan holds for it, as where the user shards.
        samples: of the rank's own, which its batch holds; with 0 it is borrowed. None if that is not known.
        module: the user's.
    """

    def __init__(self, step: int, share: Share | None, samples: int | None, module: nn.Module) -> None:
        self.step = step
        self.borrowed = samples == 0
        planned = share if share is not None and share.planned else None
        self.share = replace(planned, borrowed=True) if planned is not None and self.borrowed else planned
        self.samples = samples
        random_state = share.random_state if share is not None else None
        self.before_borrowed = ModuleSnapshot(module) if self.borrowed else None
        self._random_state = (random_state or RandomState.current()) if self.borrowed else None

    @property
    def is_whole(self) -> bool:
        """Whether the batch holds all samples of the share, so that its compute time is that of the share."""
        return self.share is not None and self.share.kept is None

    def undo_borrowed(self) -> None:
        """Restore what borrowed samples have changed."""
        if self.before_borrowed is not None:
            self.before_borrowed.undo()
        if self._random_state is not None:
            self._random_state.restore()


@dataclass(frozen=True)
class LocalCount:
    """The loss count of a rank's batch."""

    value: float | Tensor  # a tensor is on a CUDA device, and the host never reads it
    error: Exception | None = None  # raised while counting; the count is then NaN, which all ranks check for

    @classmethod
    def of(cls, context: StepContext, batch: Any, loaded: LoadedBatch) -> Self:
        """Count a batch as `training_step` gets it; borrowed samples have a count of 0."""
        if loaded.borrowed:
            return cls(0.0)
        try:
            value = context.counter(context.module, batch, loaded.samples)
        except Exception as error:  # noqa: BLE001 - whatever the user's rule raises has to reach the other ranks
            return cls(float("nan"), error)
        return cls(value if isinstance(value, Tensor) and context.counts_on_device else float(value))

    @property
    def on_device(self) -> Tensor | None:
        """The count, if only the device knows it."""
        return self.value if isinstance(self.value, Tensor) else None

    @property
    def on_host(self) -> float:
        """The count as the host knows it; 1 stands for one that only the device knows."""
        return 1.0 if isinstance(self.value, Tensor) else self.value

    @property
    def is_zero(self) -> bool:
        """Whether the host knows that the count is 0."""
        return self.on_host == 0

    @property
    def is_positive(self) -> bool | Tensor:
        """Whether the count is above 0; a tensor if only the device knows."""
        return self.value > 0 if isinstance(self.value, Tensor) else self.value != 0


class DeviceTotal:
    """Loss counts summed over all ranks on the device: reading them would make the host wait for it."""

    def __init__(self, count: LocalCount, context: StepContext) -> None:
        self._own = torch.as_tensor(count.value, dtype=torch.float64).to(context.device, non_blocking=True)
        self._world_size = context.group.world_size
        self.total = self._own.clone()
        self._work = dist.all_reduce(self.total, async_op=True) if self._world_size > 1 else None

    def wait(self) -> None:
        """Make the device's stream wait for the sum; the host continues."""
        if self._work is not None:
            self._work.wait()

    def weight(self) -> Tensor:
        """The weight of this rank's loss, see `loss_weight`."""
        return torch.where(self.total > 0, self._world_size * self._own / self.total, 0.0)


class Step:
    """A training step of this rank, from the call of `training_step` to the end of the batch.

    Args:
        context: what all steps of the fit share.
        loaded: the batch.
        count: its loss count.
        messages: those of all ranks, still being exchanged.
        accumulates: whether earlier micro-batches of the same optimizer step have left gradients.
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
        self.loaded = loaded
        self.count = count
        self.weight: float | Tensor = 1.0  # the factor on this rank's loss; valid once messages are received
        self.samples = np.ones(context.group.world_size)  # (W,), see `StepMessage`; the same
        self.logged_weight: float | Tensor | None = None  # in samples of the global batch; None: its number of samples
        self._context = context
        self._accumulates = accumulates
        self._pending: PendingMessages | None = messages
        self._device_total = DeviceTotal(count, context) if context.counts_on_device else None
        self._counts = np.ones(context.group.world_size)  # (W,) loss counts, as hosts know them

    def knows_nobody_has_samples(self) -> bool:
        """Whether no rank has a sample of its own; waits for the messages, but not where a rank asks something in one.

        A rank that waits before its forward pass may not wait for one that sends its message again in the backward
        pass.
        """
        with self._context.timer.waiting():
            messages = self._pending.receive_once() if self._pending is not None else None
        return messages is not None and not messages.column("samples").any()

    def receive(self) -> StepMessages | None:
        """Wait for the messages of all ranks, which determine this rank's weight; None if they were received before.

        Raises:
            RuntimeError, ValueError: see `StepMessages.check`; or what counting the batch raised on this rank.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        context, total = self._context, self._device_total
        with context.timer.waiting():
            messages = pending.receive()
            if total is not None:
                total.wait()
        if self.count.error is not None:
            raise self.count.error
        messages.check()
        self._counts, self.samples = messages.column("loss_count"), messages.column("samples")
        if total is not None:
            context.zero_counts.check_on_device(total.total)
        elif self.samples.any():  # else the step is skipped
            context.zero_counts.check(self.loaded.step, float(self._counts.sum()))
        self._weigh(total, self.samples)
        return messages

    def leave_out(self, skipped: NDArray[np.bool_]) -> None:
        """Batches of ranks that have skipped theirs, (W,), do not count; all ranks call this before backward."""
        if skipped[self._context.group.rank]:
            self.count = LocalCount(0.0)
        self._counts = np.where(skipped, 0.0, self._counts)
        total = DeviceTotal(self.count, self._context) if self._context.counts_on_device else None
        if total is not None:
            total.wait()
        self._weigh(total, np.where(skipped, 0.0, self.samples))

    def _weigh(self, total: DeviceTotal | None, samples: NDArray[np.float64]) -> None:
        """Determine the weights from the loss counts of all ranks, and their samples, (W,)."""
        world_size = self._context.group.world_size
        self.weight = total.weight() if total is not None else loss_weight(self._counts, self._context.group.rank)
        if self.loaded.share is None:
            self.logged_weight = self.count.value
        elif self.count.on_device is not None or tuple(self._counts) != tuple(samples):
            self.logged_weight = self.weight * float(samples.sum()) / world_size

    @contextmanager
    def weighted(self, loss: Tensor, *, averaged: bool, keeps_gradients: bool) -> Iterator[Tensor]:
        """The loss to call backward on, inside; a batch with a loss count of 0 then adds nothing to the gradients.

        Args:
            loss: the loss that `training_step` returned.
            averaged: whether the backward pass inside averages gradients over all ranks.
            keeps_gradients: whether gradients of earlier backward passes of the same step may be present.
        """
        context, positive = self._context, self.count.is_positive
        # Samples that count for nothing still take part in synchronized statistics, so their gradients there are not 0.
        layers = context.batch_norm_group if not self.loaded.borrowed and positive is not True else None
        # A mask on buckets would also erase the gradients of earlier micro-batches, which the buckets hold too.
        masked = averaged and not keeps_gradients and not self._accumulates
        with ExitStack() as hooks:
            hooks.callback(context.timer.backward_over)
            if averaged:
                waits = context.group.waits
                call = self._backward_call("backward")
                hooks.enter_context(waits.inside(call, call.name, waits.begin(call.name)))
            if layers is not None:
                hooks.enter_context(layers.backward_pass(positive))
                hooks.enter_context(gradients_without_nan(context.module, positive))
            elif self.count.is_zero:
                hooks.enter_context(gradients_unchanged(context.module))
            elif isinstance(positive, Tensor) and masked:
                hooks.enter_context(context.mask.applied(positive))
            elif isinstance(positive, Tensor):
                hooks.enter_context(gradients_unchanged(context.module, unless=positive))
            if isinstance(self.weight, Tensor):
                loss = loss * self.weight.to(loss.dtype)
            elif self.weight != 1.0 and (layers is not None or not self.count.is_zero):  # else only its graph is used
                loss = loss * self.weight
            yield loss

    def part_of_global_loss(self, loss: Tensor) -> Tensor:
        """This rank's term of the mean over all ranks that gives the loss of the global batch."""
        part = loss.detach() * self.weight
        return torch.where(torch.as_tensor(self.count.is_positive, device=part.device), part, torch.zeros_like(part))

    def average_after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over all ranks, after backward passes that each rank ran locally."""
        context = self._context
        context.timer.gradients_ready()  # the timer resumes when the backward pass is over
        average_gradients(parameters, context.group, self._backward_call("averaging"))

    def _backward_call(self, name: str) -> Call:
        return Call(name, f"the backward pass of global batch {self.loaded.step}", BACKWARD_PASS)
