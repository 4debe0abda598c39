"""Recovery from running out of memory: a rank computes the batch of a step in parts, and no sample is lost or skipped.

In steps where it may happen, which are those with a larger local batch than before, each rank runs forward and backward
without DDP's wrapper, and the ranks average their gradients afterwards. So while one rank repeats its batch in parts,
the others only wait.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.step.batch_contents import sample_count
from lightning_hetero.step.gradients import gradients_unchanged
from lightning_hetero.step.out_of_memory.batch_slicing import CannotSliceError, halves, join_outputs, slice_batch
from lightning_hetero.step.out_of_memory.errors import explained, is_out_of_memory, out_of_memory_error
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm
from lightning_hetero.step.trainable import TrainableSet

P = ParamSpec("P")
T = TypeVar("T")
Gradients = list[Tensor | None]
"""One for each parameter."""


def find_obstacle(
    module: nn.Module, model: nn.Module | None, *, automatic_optimization: bool, custom_hook: bool
) -> str | None:
    """Why no step of this run can be repeated in parts, as the end of a sentence; None if steps can.

    `model` is the strategy's wrapper around the module; `custom_hook` says whether the user gave DDP a communication
    hook or a wrapper for one.
    """
    layers = list(module.modules())
    is_ddp = isinstance(model, DistributedDataParallel) and model.mixed_precision is None
    sparse = any(isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse for layer in layers)
    # DDP marks the parameters used in a pass without its wrapper, and then misses their gradients in the next pass.
    finds_unused = isinstance(model, DistributedDataParallel) and model.find_unused_parameters
    synchronized = any(isinstance(layer, nn.SyncBatchNorm | SynchronizedBatchNorm) for layer in layers)
    obstacles = (
        (not automatic_optimization, "in manual optimization a step"),
        (custom_hook, "with a ddp_comm_hook of its own a step"),
        (not is_ddp, "with this kind of wrapper a step"),
        (sparse, "with sparse gradients a step"),
        (finds_unused, "with find_unused_parameters a step"),
        (synchronized, "with synchronized BatchNorm, which waits for the other ranks, a step"),
    )
    return next((f"{where} can't be repeated in parts" for applies, where in obstacles if applies), None)


class PartLogs(Protocol):
    """Collects what the parts of a batch log; see `trainer.training_results`."""

    def begin(self, batch: Any, samples: int) -> None:
        """Begin a part; drop what an earlier part has logged that was not kept."""

    def keep(self, loss: Tensor, count: float) -> None:
        """Keep what the part has logged: it is done."""


class PartLogging(Protocol):
    """The handler of `self.log`."""

    def in_parts(self) -> AbstractContextManager[PartLogs]:
        """A batch is computed in parts inside; each logged key is updated once, when all parts are done."""


@dataclass(frozen=True)
class PartialStep:
    """What a step whose batch may be computed in parts needs to know about that batch."""

    local_batch: int | None  # this rank's samples, 0 if borrowed; None if the user shards
    weight: Callable[[], float | Tensor]  # of this rank's loss; the first call in a step waits for other ranks
    count: Callable[[], float]  # the loss count of this rank's batch
    count_of: Callable[[Any, int], float]  # the loss count of a part of the batch, given its number of samples


@dataclass(frozen=True)
class Passes:
    """The forward and backward passes of a training step, with this run's precision and optimization."""

    forward: Callable[..., Any]  # the module's training step, without DDP's wrapper
    scaled: Callable[[Tensor], Tensor]  # a loss divided by the micro-batches of a step, times any loss scale
    backward: Callable[[Tensor], None]  # of a scaled loss
    without_logging: Callable[[], AbstractContextManager[None]]  # `self.log` does nothing inside


@dataclass(frozen=True)
class MemoryBounds:
    """Bounds on this rank's local batch, from a step that ran in parts."""

    fits: int  # samples in the largest part that was computed
    fails: int | None  # the fewest with which memory ran out; None if it did not run out again in this step


@dataclass(frozen=True)
class OutOfMemoryRecovery:
    """How the steps of a fit recover on this rank."""

    module: nn.Module
    model: nn.Module | None  # the strategy's wrapper around it
    passes: Passes
    place: str  # rank and device, such as "rank 1 (cpu)", for messages
    smallest: int  # the fewest samples that can be computed
    obstacle: str | None  # why no step can be repeated in parts; see `find_obstacle`

    def can_recover(self) -> bool:
        """Whether a step that begins now can be repeated in parts.

        With `static_graph`, DDP records the graph in the first step; without its wrapper, it would never average.
        """
        if self.obstacle is not None or not isinstance(self.model, DistributedDataParallel):
            return False
        return not self.model.static_graph or bool(self.model._static_graph_delay_allreduce_enqueued)  # noqa: SLF001 - no other way

    def explained(self, local_batch: int | None, *, risky: bool) -> AbstractContextManager[None]:
        """Like the function `explained`, with the reason why a step was not repeated in parts.

        Args:
            local_batch: the rank's samples; None if the user shards.
            risky: whether any rank had more samples in the step than ever before.
        """
        static = "with static_graph the first step can't be repeated in parts"
        reason = self.obstacle or (static if risky else "it has computed as many samples in an earlier step")
        if local_batch is None:
            reason = "where the user shards a step can't be repeated in parts"
        return explained(self.place, local_batch, reason)


@dataclass(frozen=True)
class _Part:
    """A computed part of a batch; output and loss are detached."""

    samples: int
    fraction: float  # of the loss count of the whole batch
    output: Any
    loss: Tensor


class StepInParts:
    """A step without DDP's wrapper, in one piece if it fits, else in parts; LBFGS calls it several times per step.

    Args:
        recovery: of this fit; it must be able to recover.
        step: what to know about this rank's batch.
        too_large: whether memory is already known to run out at this rank's local batch.
    """

    def __init__(self, recovery: OutOfMemoryRecovery, step: PartialStep, *, too_large: bool) -> None:
        self.memory_bounds: MemoryBounds | None = None  # set once the batch was computed in parts
        self._recovery = recovery
        self._module = recovery.module
        self._passes = recovery.passes
        self._step = step
        self._too_large = too_large
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._gradients: Gradients | None = None  # of the whole batch, if it was computed in parts

    def training_step(self, logging: PartLogging, *args: Any, **kwargs: Any) -> Any:
        """Call the module's training step on a batch; if memory runs out, run it and the backward pass in parts.

        Raises:
            RankOutOfMemoryError: not even a part can be computed.
        """
        self._args, self._kwargs, self._gradients = args, kwargs, None
        self._prepare_forward()
        before = ModuleSnapshot(self._module)
        details: str | None = "it did so in an earlier step"
        if not self._too_large:
            output, details = _attempt(self._passes.forward, *args, **kwargs)
        if details is None:
            return output
        before.restore()
        earlier = _take_gradients(self._module)  # Lightning has not cleared those of the last step yet
        with logging.in_parts() as logs:
            self._gradients, output = self._in_parts(details, logs)
        _add_gradients(self._module, earlier)
        return output

    def backward(
        self, loss: Tensor, *graph: Tensor, average: Callable[[Sequence[nn.Parameter]], None] | None = None
    ) -> None:
        """Run backward on this rank alone, in parts if memory runs out, and then average the gradients over all ranks.

        Args:
            loss: the loss to call backward on, scaled for the precision in use.
            *graph: further tensors that hold its graph, for instance the unscaled loss.
            average: called with the parameters when their gradients are complete; None before the last micro-batch.
        """
        earlier = _take_gradients(self._module)
        gradients, self._gradients = self._gradients, None
        details = _attempt(self._passes.backward, loss)[1] if gradients is None else None
        if details is not None:
            _take_gradients(self._module)  # drop what the failed backward pass has left
            for tensor in (loss, *graph):
                # Lightning still references the loss, whose graph would occupy the memory that the parts need.
                with contextlib.suppress(RuntimeError):
                    tensor.detach_()
            # The forward pass of the whole batch has succeeded: keep its buffers and what it has logged.
            after = ModuleSnapshot(self._module)
            with self._passes.without_logging():
                gradients, _ = self._in_parts(details, None)
            after.restore()
        if gradients is not None:
            _add_gradients(self._module, gradients)
        _add_gradients(self._module, earlier)
        if average is not None:
            average(list(TrainableSet.of(self._module).named.values()))

    def _prepare_forward(self) -> None:
        """Do what DDP's forward does before it calls the module's forward."""
        model = self._recovery.model
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(f"{type(model).__name__} is not DDP's wrapper: a step can't run without it")
        if model.will_sync_module_buffers():
            model._sync_buffers()  # noqa: SLF001 - this stands in for DDP's forward
        model.require_forward_param_sync = model.require_backward_grad_sync

    def _in_parts(self, details: str, logs: PartLogs | None) -> tuple[Gradients, Any]:
        """Run forward and backward on halves of the batch, and on halves of those, until they fit.

        Returns the gradients, with the rank's weight, and what the training step would have returned. `details` is the
        message of the error that led here; `logs` collects what is logged, unless the batch has already been logged.
        """
        place, size = self._recovery.place, self._step.local_batch or sample_count(self._args[0])
        weight, total = self._step.weight(), self._step.count()
        gradients: Gradients = [None for _ in self._module.parameters()]
        parts: list[_Part] = []
        pending, too_many, ran_out = [(0, size)], size, not self._too_large
        self._too_large = True
        while pending:
            start, stop = pending.pop()
            if stop - start >= too_many:
                _release_memory()
                two = halves(stop - start, self._recovery.smallest)
                if two is None:
                    raise out_of_memory_error(place, size, f"{stop - start} of its samples alone do not fit", details)
                pending += [(start + two[0], stop), (start, start + two[0])]
                continue
            before = ModuleSnapshot(self._module)
            try:
                batch = slice_batch(self._args[0], size, start, stop)
            except CannotSliceError as error:
                raise out_of_memory_error(place, size, f"its batch can't be cut into parts: {error}", details) from None
            part, _ = _attempt(self._compute, batch, stop - start, weight, total, logs)
            if part is not None:
                parts.append(part)
                _add_gradients(self._module, gradients)
                gradients = _take_gradients(self._module)
            else:
                too_many, ran_out = stop - start, True
                pending.append((start, stop))
                before.restore()
                _take_gradients(self._module)  # drop what a failed backward pass has left
        if ran_out or self.memory_bounds is None:  # else an earlier closure of this step has found these bounds
            self.memory_bounds = MemoryBounds(max(part.samples for part in parts), too_many if ran_out else None)
        return _joined(parts, gradients)

    def _compute(self, batch: Any, samples: int, weight: float | Tensor, total: float, logs: PartLogs | None) -> _Part:
        """Run forward and backward on one part."""
        if logs is not None:
            logs.begin(batch, samples)
        count = self._step.count_of(batch, samples)
        fraction = count / total if total > 0 else 0.0
        output = self._passes.forward(batch, *self._args[1:], **self._kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {type(loss).__name__} and no loss for a part of its batch")
        factor = weight.to(loss.dtype) if isinstance(weight, Tensor) else weight
        # A weight of 0 is not enough for a part with a loss count of 0: its loss may be NaN.
        with gradients_unchanged(self._module) if fraction == 0 else nullcontext():
            self._passes.backward(self._passes.scaled(loss * (factor * fraction)))
        if logs is not None:
            logs.keep(loss.detach(), count)
        if isinstance(output, Mapping):
            output = {key: value.detach() if isinstance(value, Tensor) else value for key, value in output.items()}
        else:
            output = loss.detach()
        return _Part(samples, fraction, output, loss.detach())


def _attempt(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, str | None]:
    """What `call` returns, and None; or None and the error's message if memory runs out.

    The error itself is released, and with it the frames that hold the activations.
    """
    try:
        return call(*args, **kwargs), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error)


def _joined(parts: Sequence[_Part], gradients: Gradients) -> tuple[Gradients, Any]:
    """The gradients of all parts together, and what the training step would have returned for all of them."""
    counted = sum(part.fraction for part in parts)
    if counted > 0 and not math.isclose(counted, 1.0, rel_tol=1e-9):
        # The user's counts of the parts don't add up to that of the batch, so only their ratios are used.
        gradients = [None if gradient is None else gradient.div_(counted) for gradient in gradients]
    sizes = [part.samples for part in parts]
    weights = [part.fraction / counted if counted > 0 else part.samples / sum(sizes) for part in parts]
    # A part of weight 0 is left out: its loss may be NaN.
    terms = [part.loss * weight for part, weight in zip(parts, weights, strict=True) if weight > 0]
    loss = torch.stack(terms).sum().requires_grad_()
    return gradients, join_outputs([part.output for part in parts], sizes, loss)


def _take_gradients(module: nn.Module) -> Gradients:
    """Return the gradients, and clear them on the parameters."""
    taken = [parameter.grad for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = None
    return taken


@torch.no_grad()
def _add_gradients(module: nn.Module, gradients: Gradients) -> None:
    """Add gradients to those of the parameters; the given tensors must not be used afterwards."""
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        if gradient is not None:
            # Adding in place to the earlier tensor keeps it a view of DDP's buckets.
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
