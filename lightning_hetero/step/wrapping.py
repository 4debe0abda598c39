"""Wraps a module in DDP anew, or does without its wrapper in a step, when other parameters train than it knows.

DDP averages only the gradients of parameters that required them when it was constructed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.exchange.calls import UnmatchedCallError
from lightning_hetero.exchange.messages import CHANGES, PendingMessages, StepMessage
from lightning_hetero.step.step import StepContext
from lightning_hetero.step.trainable import TrainableParameters, TrainableSet


def wrap_anew(
    module: nn.Module,
    model: nn.Module | None,
    new: Sequence[nn.Parameter],
    device: torch.device,
    options: Mapping[str, Any],
) -> nn.Module:
    """Wrap a module whose other parameters train now; all ranks call it together, before a forward pass.

    Nothing is exchanged but the values of new parameters: all others are equal on the ranks, and running statistics
    stay each rank's own until they are merged.

    Args:
        module: to wrap.
        model: the wrapper before, or the module itself if nothing trained.
        new: trainable parameters that were added since; they get rank 0's values, and the buffers beside them too.
        device: of this rank.
        options: of DDP.

    Returns:
        The new wrapper; the module itself if no parameter trains.

    Raises:
        RuntimeError: DDP's, if the last backward pass was not averaged to its end.
        ValueError: a new parameter is on another device.
    """
    if isinstance(model, DistributedDataParallel):
        model._check_reducer_finalized()  # noqa: SLF001 - else its error would be lost
        model._remove_autograd_hooks()  # noqa: SLF001 - others may still refer to it
    _broadcast_new(module, new, device)
    if not TrainableSet.of(module).named:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids, **{**options, "init_sync": False})


@torch.no_grad()
def _broadcast_new(module: nn.Module, new: Sequence[nn.Parameter], device: torch.device) -> None:
    ids = set(map(id, new))
    for path, layer in module.named_modules():
        own = {f"{path}.{name}".lstrip("."): one for name, one in layer.named_parameters(recurse=False)}
        own = {name: one for name, one in own.items() if id(one) in ids}
        for name, one in own.items():
            if one.device != device:
                raise ValueError(f"{name}, which was added during training, is on {one.device}: move it to {device}")
        ids -= set(map(id, own.values()))
        for tensor in [*own.values(), *(layer.buffers(recurse=False) if own else ())]:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


def bypass(
    model: nn.Module | None, trainable: TrainableParameters, context: StepContext, step: int
) -> list[nn.Parameter]:
    """Let DDP's wrapper not average a step, since `training_step` has changed which parameters train.

    Args:
        model: the wrapper, if there is one.
        trainable: the parameters that train.
        context: of the fit's steps.
        step: the global batch.

    Returns:
        The parameters whose gradients have to be averaged after the backward pass.

    Raises:
        RuntimeError: on another rank nothing has changed, or something else.
    """
    parameters = trainable.bypass()
    if isinstance(model, DistributedDataParallel):
        model._remove_autograd_hooks()  # noqa: SLF001 - there is no public name for it

    with context.timer.waiting():
        message = StepMessage(CHANGES, step, trainable=trainable.current.checksum)
        try:
            messages = PendingMessages(context.group, message).receive()
        except UnmatchedCallError as error:
            raise UnmatchedCallError(
                f"training_step has changed which parameters train in global batch {step} on rank "
                f"{context.group.rank}, but not on all other ranks: set requires_grad on all ranks alike ({error})"
            ) from None
    messages.check()
    trainable.check(messages.column("trainable").tolist(), step)
    return parameters
