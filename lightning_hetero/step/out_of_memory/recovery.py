"""Recovery from running out of memory: a rank computes the batch of a step in parts, and no sample is lost or skipped.

Where it may happen, in steps with a larger local batch than before, each rank goes forward and backward past DDP's
wrapper, and the ranks average their gradients afterwards. So the others only wait while one repeats its batch in parts.
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
from lightning_hetero.step.gradients import gradients_left_alone
from lightning_hetero.step.out_of_memory.batch_slicing import CannotSliceError, halves, join_outputs, slice_batch
from lightning_hetero.step.out_of_memory.errors import explained, explanation, is_out_of_memory
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm

P = ParamSpec("P")
T = TypeVar("T")
Gradients = list[Tensor | None]
"""One for each parameter."""


def find_obstacle(
    module: nn.Module, model: nn.Module | None, *, automatic_optimization: bool, custom_hook: bool
) -> str | None:
    """Why no step of this run can be repeated in parts, as the end of a sentence; None if steps can.

    `model` is what the strategy has wrapped the module in; `custom_hook` says whether the user gave DDP a communication
    hook, or a wrapper for one.
    """
    layers = list(module.modules())
    is_ddp = isinstance(model, DistributedDataParallel) and model.mixed_precision is None
    sparse = any(isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse for layer in layers)
    # DDP marks what a pass past its wrapper uses, and misses the gradients of it in the next one.
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
    """Gathers what the parts of a batch log; see `trainer.training_results`."""

    def begin(self, batch: Any) -> None:
        """A part begins; what a part that was not kept has logged is forgotten."""

    def keep(self, loss: Tensor, count: float) -> None:
        """The part is done."""


class PartLogging(Protocol):
    """What handles `self.log`."""

    def in_parts(self) -> AbstractContextManager[PartLogs]:
        """A batch is computed in parts inside; each key is updated once, when all of them are done."""


@dataclass(frozen=True)
class PartialStep:
    """What is needed to know of a step whose batch is computed in parts."""

    local_batch: int | None  # this rank's samples, 0 if they are borrowed; None where the user shards
    weight: Callable[[], float | Tensor]  # of this rank's loss; waits for the other ranks the first time in a step
    count: Callable[[], float]  # of this rank's batch
    count_of: Callable[[Any, int], float]  # of a part of the batch, from that and its number of samples


@dataclass(frozen=True)
class Passes:
    """The passes of a training step, as this run's precision and optimization make them."""

    forward: Callable[..., Any]  # the module's training step, past DDP's wrapper
    scaled: Callable[[Tensor], Tensor]  # a loss divided by the micro-batches of a step, and times the loss scale if any
    backward: Callable[[Tensor], None]  # goes backward from a scaled loss
    without_logging: Callable[[], AbstractContextManager[None]]  # `self.log` does nothing inside


@dataclass(frozen=True)
class MemoryFound:
    """What a step in parts has shown of this rank's memory."""

    fits: int  # samples of the largest part that was computed
    fails: int | None  # the fewest with which memory ran out; None where the batch was known to be too large before


@dataclass(frozen=True)
class OutOfMemoryRecovery:
    """How the steps of a fit recover on this rank."""

    module: nn.Module
    model: nn.Module | None  # what the strategy has wrapped it in
    passes: Passes
    place: str  # rank and device, such as "rank 1 (cpu)", for messages
    smallest: int  # the fewest samples that can be computed
    obstacle: str | None  # why no step can be repeated in parts; see `find_obstacle`

    def can_recover(self) -> bool:
        """Whether a step that begins now can be repeated in parts.

        With `static_graph`, DDP records the graph in the first step, and never averages if that went past its wrapper.
        """
        if self.obstacle is not None or not isinstance(self.model, DistributedDataParallel):
            return False
        return not self.model.static_graph or bool(self.model._static_graph_delay_allreduce_enqueued)  # noqa: SLF001 - no other way

    def explained(self, local_batch: int | None, *, risky: bool) -> AbstractContextManager[None]:
        """As the function `explained`, with the reason why a step was not repeated in parts.

        Args:
            local_batch: samples of the rank; None where the user shards.
            risky: a rank had more samples in the step than ever before.
        """
        static = "with static_graph the first step can't be repeated in parts"
        reason = self.obstacle or (static if risky else "it has computed as many samples in an earlier step")
        if local_batch is None:
            reason = "where the user shards a step can't be repeated in parts"
        return explained(self.place, local_batch, reason)


@dataclass(frozen=True)
class _Part:
    """A part of a batch that has been computed; output and loss have no graph."""

    samples: int
    fraction: float  # of what the whole batch counts for
    output: Any
    loss: Tensor


class StepInParts:
    """A step past DDP's wrapper, in one piece if it fits, else in parts; LBFGS goes through it several times.

    Args:
        recovery: of this fit, which can recover.
        step: of this rank.
        too_large: memory is known to run out with as many samples as this rank has in it.
    """

    def __init__(self, recovery: OutOfMemoryRecovery, step: PartialStep, *, too_large: bool) -> None:
        self.found: MemoryFound | None = None  # once the batch was computed in parts
        self._recovery = recovery
        self._module = recovery.module
        self._passes = recovery.passes
        self._step = step
        self._too_large = too_large
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._gradients: Gradients | None = None  # of the whole batch, where it was computed in parts

    def training_step(self, logging: PartLogging, *args: Any, **kwargs: Any) -> Any:
        """The module's training step, of a batch and further arguments; if memory runs out, that and backward in parts.

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
        earlier = _take_gradients(self._module)  # Lightning is yet to clear those of the last step
        with logging.in_parts() as logs:
            self._gradients, output = self._in_parts(details, logs)
        _add_gradients(self._module, earlier)
        return output

    def backward(
        self, loss: Tensor, *graph: Tensor, average: Callable[[Sequence[nn.Parameter]], None] | None = None
    ) -> None:
        """Go backward on this rank alone, in parts if memory runs out, and then average the gradients over all ranks.

        Args:
            loss: to go backward from, scaled as the precision in use wants it.
            *graph: further tensors that hold its graph, the unscaled loss for instance.
            average: called with the parameters when their gradients are complete; None before the last micro-batch.
        """
        earlier = _take_gradients(self._module)
        gradients, self._gradients = self._gradients, None
        details = _attempt(self._passes.backward, loss)[1] if gradients is None else None
        if details is not None:
            _take_gradients(self._module)  # what the broken backward pass has left is dropped
            for tensor in (loss, *graph):
                # Lightning still holds the loss: the graph behind it would take the memory that the parts need.
                with contextlib.suppress(RuntimeError):
                    tensor.detach_()
            # The forward pass of the whole batch was done: its buffers and what it logged stay.
            after = ModuleSnapshot(self._module)
            with self._passes.without_logging():
                gradients, _ = self._in_parts(details, None)
            after.restore()
        if gradients is not None:
            _add_gradients(self._module, gradients)
        _add_gradients(self._module, earlier)
        if average is not None:
            ignored = getattr(self._module, "_ddp_params_and_buffers_to_ignore", ())
            average([p for name, p in self._module.named_parameters() if p.requires_grad and name not in ignored])

    def _prepare_forward(self) -> None:
        """Do what DDP's forward does before it calls the module's."""
        model = self._recovery.model
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(f"{type(model).__name__} is not DDP's wrapper: a step can't go past it")
        if model.will_sync_module_buffers():
            model._sync_buffers()  # noqa: SLF001 - this stands in for DDP's forward
        model.require_forward_param_sync = model.require_backward_grad_sync

    def _in_parts(self, details: str, logs: PartLogs | None) -> tuple[Gradients, Any]:
        """Forward and backward of halves of the batch, and of halves of those, until they fit.

        Returns the gradients, with the rank's weight, and what the training step would have returned. `details` is the
        message of the error that led here; `logs` gathers what is logged, where that was not done before.
        """
        place, size = self._recovery.place, self._step.local_batch or sample_count(self._args[0])
        weight, total = self._step.weight(), self._step.count()
        gradients: Gradients = [None for _ in self._module.parameters()]
        parts: list[_Part] = []
        waiting, too_many, ran_out = [(0, size)], size, not self._too_large
        self._too_large = True
        while waiting:
            start, stop = waiting.pop()
            if stop - start >= too_many:
                _release_memory()
                two = halves(stop - start, self._recovery.smallest)
                if two is None:
                    raise explanation(place, size, f"{stop - start} of its samples alone do not fit", details)
                waiting += [(start + two[0], stop), (start, start + two[0])]
                continue
            before = ModuleSnapshot(self._module)
            try:
                batch = slice_batch(self._args[0], size, start, stop)
            except CannotSliceError as error:
                raise explanation(place, size, f"its batch can't be cut into parts: {error}", details) from None
            part, _ = _attempt(self._compute, batch, stop - start, weight, total, logs)
            if part is not None:
                parts.append(part)
                _add_gradients(self._module, gradients)
                gradients = _take_gradients(self._module)
            else:
                too_many, ran_out = stop - start, True
                waiting.append((start, stop))
                before.restore()
                _take_gradients(self._module)  # what a broken backward pass has left is dropped
        if ran_out or self.found is None:  # else an earlier closure of the same step has found more
            self.found = MemoryFound(max(part.samples for part in parts), too_many if ran_out else None)
        return _joined(parts, gradients)

    def _compute(self, batch: Any, samples: int, weight: float | Tensor, total: float, logs: PartLogs | None) -> _Part:
        """Forward and backward of one part."""
        if logs is not None:
            logs.begin(batch)
        count = self._step.count_of(batch, samples)
        fraction = count / total if total > 0 else 0.0
        output = self._passes.forward(batch, *self._args[1:], **self._kwargs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {type(loss).__name__} and no loss for a part of its batch")
        factor = weight.to(loss.dtype) if isinstance(weight, Tensor) else weight
        # Weight 0 is not enough for a part of which nothing counts: its loss may be NaN.
        with gradients_left_alone(self._module) if fraction == 0 else nullcontext():
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

    The error is gone then, and with it the frames that held the activations.
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
        # The user's counts of parts don't add up to that of the batch: then only their ratios mean something.
        gradients = [None if gradient is None else gradient.div_(counted) for gradient in gradients]
    sizes = [part.samples for part in parts]
    weights = [part.fraction / counted if counted > 0 else part.samples / sum(sizes) for part in parts]
    # A part of weight 0 is left out: its loss may be NaN.
    terms = [part.loss * weight for part, weight in zip(parts, weights, strict=True) if weight > 0]
    loss = torch.stack(terms).sum().requires_grad_()
    return gradients, join_outputs([part.output for part in parts], sizes, loss)


def _take_gradients(module: nn.Module) -> Gradients:
    """Take the gradients away from the parameters."""
    taken = [parameter.grad for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = None
    return taken


@torch.no_grad()
def _add_gradients(module: nn.Module, gradients: Gradients) -> None:
    """Add gradients to those that the parameters have; the tensors given are used up."""
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        if gradient is not None:
            # Adding to the tensor that was there first keeps DDP's views of its buckets.
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
