"""Surviving an out-of-memory error: the rank computes its batch in parts, and nothing is lost or skipped.

Where it may happen, in steps with a larger local batch than before, ranks go forward and backward each by itself, past
DDP's wrapper, and average their gradients afterwards. So the others just wait while one does it in parts.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.step import batch_slicing
from lightning_hetero.step.gradients import gradients_left_alone
from lightning_hetero.step.loss_count import sample_count
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.step.step import TrainingSteps
from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm

Gradients = list[Tensor | None]
"""One a parameter."""

_SIGNS = ("can't allocate memory", "not enough memory", "bad_alloc", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on CUDA or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def impossible(module: nn.Module, model: object, *, automatic: bool, hooked: bool) -> str | None:
    """Why running out of memory can't be survived in this run, as the end of a sentence; None if it can.

    Args:
        module: the LightningModule.
        model: what the strategy has made of it.
        automatic: optimization is.
        hooked: the user gave DDP a communication hook, or a wrapper for one.
    """
    layers = list(module.modules())
    wrapped = isinstance(model, DistributedDataParallel) and model.mixed_precision is None
    sparse = any(isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse for layer in layers)
    # DDP marks what a pass past its wrapper uses, and misses the gradients of it in the next one.
    marks = isinstance(model, DistributedDataParallel) and model.find_unused_parameters
    waits = any(isinstance(layer, nn.SyncBatchNorm | SynchronizedBatchNorm) for layer in layers)
    obstacles = (
        (not automatic, "in manual optimization a step"),
        (hooked, "with a ddp_comm_hook of its own a step"),
        (not wrapped, "with this kind of wrapper a step"),
        (sparse, "with sparse gradients a step"),
        (marks, "with find_unused_parameters a step"),
        (waits, "with synchronised BatchNorm, which waits for the other ranks, a step"),
    )
    return next((f"{what} can't be repeated in parts" for there, what in obstacles if there), None)


@contextmanager
def explained(place: str, local_batch: int | None, reason: str) -> Iterator[None]:
    """An out-of-memory error inside says where it happened, why it ends the run, and what to do.

    Args:
        place: rank and device.
        local_batch: samples of the rank; None if not known.
        reason: why it is not survived.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and not getattr(error, "explained", False):
            error.args = (_sentence(place, local_batch, reason, str(error)),)
            error.explained = True  # type: ignore[attr-defined] # it may pass here again on its way
        raise


def _sentence(place: str, local_batch: int | None, reason: str, said: str) -> str:
    samples = f" at a local batch of {local_batch}" if local_batch is not None else ""
    return (
        f"{place} ran out of memory{samples}, and {reason}; use a smaller global_batch, shares that give this rank "
        f"less, or a lower memory_limit ({said.splitlines()[0] if said else 'no further details'})"
    )


class PartLogging(Protocol):
    """What `self.log` gives while a batch is computed in parts; see `metrics.StepLogging`."""

    def in_parts(self) -> AbstractContextManager["PartLogs"]:
        """Each key is updated once, when all parts are done."""


class PartLogs(Protocol):
    """Gathers what the parts log."""

    def begin(self, batch: Any) -> None:
        """A part begins; what one that was not kept has logged is forgotten."""

    def keep(self, loss: Tensor, count: float) -> None:
        """The part is done."""


class _NoLogs:
    def begin(self, batch: Any) -> None:
        pass

    def keep(self, loss: Tensor, count: float) -> None:
        pass


@dataclass(frozen=True)
class Passes:
    """The passes of a step, as this run makes them.

    Attributes:
        forward: the module's training step, past DDP's wrapper.
        backward: from a loss.
        scaled: a loss as the precision in use wants it.
        accumulated: micro-batches in an optimizer step.
    """

    forward: Callable[..., Any]
    backward: Callable[[Tensor], None]
    scaled: Callable[[Tensor], Tensor]
    accumulated: Callable[[], int]


class Recovery:
    """The risky steps of one rank; see `TrainingSteps.risky`.

    Args:
        module: the LightningModule.
        model: DDP's wrapper of it.
        steps: this rank's.
        passes: of this run.
        place: rank and device, for messages.
        smallest: the least that can be computed.
    """

    def __init__(
        self,
        module: nn.Module,
        model: DistributedDataParallel,
        steps: TrainingSteps,
        passes: Passes,
        *,
        place: str,
        smallest: int,
    ) -> None:
        self._module = module
        self._model = model
        self._steps = steps
        self._passes = passes
        self._place = place
        self._smallest = smallest
        self._arguments: tuple[Any, ...] = ()
        self._keywords: dict[str, Any] = {}
        self._done: Gradients | None = None

    @property
    def ready(self) -> bool:
        """Whether this step may go past DDP's wrapper.

        With `static_graph`, DDP learns the graph in the first step, and averages nothing later on if that went past it.
        """
        model = self._model
        return not model.static_graph or bool(model._static_graph_delay_allreduce_enqueued)  # noqa: SLF001 - no other way

    def training_step(self, logging: PartLogging, *args: Any, **kwargs: Any) -> Any:
        """The module's training step; if memory runs out, that and the backward pass, in parts.

        Args:
            logging: of this step.
            *args: of the module's training step, the batch first.
            **kwargs: likewise.

        Raises:
            RuntimeError: not even a part can be computed.
        """
        self._arguments, self._keywords, self._done = args, kwargs, None
        self._follow_buffers()
        before = ModuleSnapshot(self._module)
        said = "it did so in an earlier step"
        if not self._steps.too_large:
            try:
                return self._passes.forward(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error)
        # Here the error is gone, and with it the frames that held the activations.
        before.restore()
        # Lightning is yet to clear the gradients of the last step.
        earlier = self._set_aside()
        with logging.in_parts() as logs:
            self._done, output = self._in_parts(said, logs)
        self._put_back(earlier)
        return output

    def backward(self, loss: Tensor, *holders: Tensor, average: bool) -> None:
        """Go backward by itself, in parts if memory runs out, and then average the gradients over all ranks.

        Args:
            loss: to go backward from.
            *holders: further tensors that hold its graph.
            average: the gradients are complete with this micro-batch.

        Raises:
            RuntimeError: not even a part can be computed.
        """
        earlier = self._set_aside()
        if self._done is None:
            said = self._try_backward(loss)
            if said is not None:
                self._set_aside()  # what the broken backward pass has left is dropped
                for tensor in (loss, *holders):
                    # Lightning still holds the loss: what hangs on it would be in the way of the parts.
                    with contextlib.suppress(RuntimeError):
                        tensor.detach_()
                after = ModuleSnapshot(self._module)
                with self._silenced():
                    self._done, _ = self._in_parts(said, _NoLogs())
                after.restore()
        if self._done is not None:
            self._put_back(self._done)
        self._put_back(earlier)
        self._done, self._arguments, self._keywords = None, (), {}
        if average:
            self._steps.average(self._averaged())

    def _follow_buffers(self) -> None:
        """What DDP's forward does with buffers before the module's."""
        if self._model.will_sync_module_buffers():
            self._model._sync_buffers()  # noqa: SLF001 - this stands in for DDP's forward
        self._model.require_forward_param_sync = self._model.require_backward_grad_sync

    def _averaged(self) -> list[nn.Parameter]:
        ignored = getattr(self._module, "_ddp_params_and_buffers_to_ignore", ())
        return [p for name, p in self._module.named_parameters() if p.requires_grad and name not in ignored]

    def _set_aside(self) -> Gradients:
        """Take the gradients away from the parameters."""
        taken: Gradients = []
        for parameter in self._module.parameters():
            taken.append(parameter.grad)
            parameter.grad = None
        return taken

    @torch.no_grad()
    def _put_back(self, gradients: Gradients) -> None:
        """Add gradients to those that the parameters have; the tensors given are used up."""
        for parameter, gradient in zip(self._module.parameters(), gradients, strict=True):
            if gradient is not None:
                # Adding to the tensor that was there first keeps DDP's views of its buckets.
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _try_backward(self, loss: Tensor) -> str | None:
        """Go backward; what is said of it if memory runs out."""
        try:
            self._passes.backward(loss)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return str(error)
        return None

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        """`self.log` does nothing: the whole batch has been logged already."""
        names = [name for name in ("log", "log_dict") if hasattr(self._module, name)]
        had = {name: vars(self._module)[name] for name in names if name in vars(self._module)}
        vars(self._module).update({name: lambda *_, **__: None for name in names})
        try:
            yield
        finally:
            for name in names:
                del vars(self._module)[name]
            vars(self._module).update(had)

    def _in_parts(self, said: str, logs: PartLogs) -> tuple[Gradients, Any]:
        """Forward and backward of halves of the batch, and of halves of those, until they fit.

        Args:
            said: the error that led here.
            logs: gathers what is logged.

        Returns:
            The gradients, with the rank's weight, and what the training step would have returned.
        """
        batch, *rest = self._arguments
        size = self._steps.local_batch or sample_count(batch)
        weight, total = self._steps.weigh(), self._steps.count
        gradients: Gradients = [None for _ in self._module.parameters()]
        outputs: list[Any] = []
        losses: list[Tensor] = []
        sizes: list[int] = []
        shares: list[float] = []
        waiting, too_large, ran_out = [(0, size)], size, not self._steps.too_large
        while waiting:
            start, stop = waiting.pop()
            if stop - start >= too_large:
                self._release()
                halves = batch_slicing.halves(stop - start, self._smallest)
                if halves is None:
                    raise self._hopeless(size, f"{stop - start} of its samples alone do not fit", said)
                waiting += [(start + halves[0], stop), (start, start + halves[0])]
                continue
            try:
                part = batch_slicing.part(batch, size, start, stop)
                logs.begin(part)
                count = self._steps.count_of(part, stop - start)
                share = count / total if total > 0 else 0.0
                output, loss = self._part(part, rest, weight, share)
            except batch_slicing.CannotCutError as error:
                raise self._hopeless(size, f"its batch can't be cut into parts: {error}", said) from None
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                too_large, ran_out = stop - start, True
                waiting.append((start, stop))
            else:
                logs.keep(loss, count)
                gradients = _sum(gradients, self._set_aside())
                outputs.append(output)
                losses.append(loss)
                sizes.append(stop - start)
                shares.append(share)
                continue
            self._set_aside()  # what a broken backward pass has left is dropped
        self._steps.computed_in_parts(max(sizes), too_large if ran_out else None)
        if (counted := sum(shares)) > 0 and not math.isclose(counted, 1.0, rel_tol=1e-9):
            # The user's counts of parts don't add up to that of the batch: then only their ratios mean something.
            shares = [share / counted for share in shares]
            gradients = [None if gradient is None else gradient.div_(counted) for gradient in gradients]
        parts = [
            loss * share for loss, share in zip(losses, shares if total > 0 else _even(sizes), strict=True) if share > 0
        ]
        value = torch.stack(parts).sum().requires_grad_()
        return gradients, batch_slicing.joined(outputs, sizes, value)

    def _part(self, batch: Any, rest: Sequence[Any], weight: float | Tensor, share: float) -> tuple[Any, Tensor]:
        """Forward and backward of one part: what it returned, and its loss, without their graph."""
        output = self._passes.forward(batch, *rest, **self._keywords)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {type(loss).__name__} and no loss for a part of its batch")
        factor = weight.to(loss.dtype) if isinstance(weight, Tensor) else weight
        # Weight 0 is not enough for a part of which nothing counts: its loss may be NaN.
        with gradients_left_alone(self._module) if share == 0 else nullcontext():
            self._passes.backward(self._passes.scaled(loss * (factor * share / self._passes.accumulated())))
        if not isinstance(output, Mapping):
            return loss.detach(), loss.detach()
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in output.items()}, loss.detach()

    def _release(self) -> None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _hopeless(self, size: int, reason: str, said: str) -> RuntimeError:
        error = RuntimeError(_sentence(self._place, size, reason, said))
        error.explained = True  # type: ignore[attr-defined] # see `explained`
        return error


def _even(sizes: Sequence[int]) -> list[float]:
    return [size / sum(sizes) for size in sizes]


@torch.no_grad()
def _sum(sums: Gradients, gradients: Gradients) -> Gradients:
    """Add gradients up in place."""
    return [
        gradient if total is None else total if gradient is None else total.add_(gradient)
        for total, gradient in zip(sums, gradients, strict=True)
    ]
