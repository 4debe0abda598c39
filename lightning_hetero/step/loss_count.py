"""What a batch counts for: the number that its loss was averaged over.

The rule is found once a run, in this order: the user's callable, the module's own `loss_count`, what is known of
TorchGeo's tasks, the number of samples.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.step.torchgeo import IMAGE_TASKS, TARGETS, task_name, unchanged_task

Count = float | Tensor
"""A number, or a tensor without dimensions on the module's device."""

CROSS_ENTROPY_DEFAULT_IGNORE_INDEX = -100


@dataclass(frozen=True)
class LossCounter:
    """How batches are counted in this run.

    Args:
        rule: what is counted, in words, for warnings and errors.
        count: from the module and a batch, as `training_step` gets it, to the batch's loss count; None: its samples.
        advice: how to make the rule exact where it is only a guess; empty otherwise.
    """

    rule: str
    count: Callable[[Any, Any], Count] | None = None
    advice: str = ""

    def __call__(self, module: nn.Module, batch: Any, samples: int | None = None) -> Count:
        """The loss count of a batch.

        Args:
            module: the LightningModule.
            batch: as `training_step` gets it.
            samples: that went into it, if known; see `sample_count`.

        Raises:
            TypeError: the rule returned something that is neither a number nor a tensor without dimensions.
        """
        value = self.count(module, batch) if self.count is not None else sample_count(batch, samples)
        if isinstance(value, Tensor):
            if value.ndim != 0:
                raise TypeError(
                    f"the loss count ({self.rule}) is a tensor of shape {tuple(value.shape)}; it has to be one number: "
                    "return its sum"
                )
            return value.detach()
        try:
            return float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"the loss count ({self.rule}) is {value!r}; it has to be a number or a tensor without dimensions"
            ) from None


def find(module: nn.Module, given: Callable[[Any, Any], Count] | None) -> LossCounter:
    """The rule for `module`.

    Args:
        module: the LightningModule.
        given: the user's `loss_count=`, if any.
    """
    if given is not None:
        return LossCounter("the strategy's loss_count", given)
    if callable(getattr(module, "loss_count", None)):
        return LossCounter("the module's loss_count", _declared)
    task = _torchgeo_rule(module)
    if task is not None:
        return task
    return LossCounter("samples", advice=_advice(module))


def _torchgeo_rule(module: nn.Module) -> LossCounter | None:
    task = unchanged_task(module)
    if task is None:
        return None
    if task_name(task) in IMAGE_TASKS:
        return LossCounter(f"images of {task}", lambda _, batch: len(batch["image"]))
    criterion = getattr(module, "criterion", None)
    if getattr(criterion, "reduction", None) != "mean":
        return None
    key = str(getattr(module, "target_key", TARGETS[task_name(task)]))
    if isinstance(criterion, nn.CrossEntropyLoss):
        return LossCounter(
            f"valid targets of {task}", lambda owner, batch: cross_entropy_count(owner.criterion, batch[key])
        )
    if type(criterion) in (nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss):
        return LossCounter(f"target elements of {task}", lambda _, batch: float(batch[key].numel()))
    return None


def cross_entropy_count(criterion: nn.CrossEntropyLoss | nn.NLLLoss, target: Tensor) -> Count:
    """What `nn.CrossEntropyLoss` and `nn.NLLLoss` divide by: valid targets, or their summed class weights.

    Args:
        criterion: the live loss, with its `ignore_index` and `weight`.
        target: class numbers, any shape.
    """
    if target.is_floating_point():  # class probabilities: the mean is over everything but the class dimension
        return float(target.numel() // target.shape[1] if target.ndim > 1 else target.numel())
    valid = target != int(criterion.ignore_index)
    weight = criterion.weight
    if not isinstance(weight, Tensor):
        return valid.sum()
    classes = torch.where(valid, target, 0)
    return (weight.double()[classes] * valid).sum()


def _declared(module: Any, batch: Any) -> Count:
    count: Count = module.loss_count(batch)
    return count


def _weighted_losses(module: nn.Module) -> Iterable[str]:
    for name, loss in module.named_modules():
        if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
            continue
        if loss.weight is not None or loss.ignore_index not in (CROSS_ENTROPY_DEFAULT_IGNORE_INDEX, -1000):
            yield name


def _advice(module: nn.Module) -> str:
    names = list(_weighted_losses(module))
    if not names:
        return ""
    return (
        f"{type(module).__name__}.{names[0]} averages over valid or class-weighted targets, but batches are counted by "
        "samples, so the gradient is only nearly that of the global batch. To make it exact, give the module\n"
        "    def loss_count(self, batch):\n"
        "        return lightning_hetero.cross_entropy_count(self."
        f"{names[0]}, batch['mask'])  # the targets, as training_step gets them"
    )


def sample_count(batch: Any, drawn: int | None = None) -> int:
    """Number of samples in a batch: the length of its tensors.

    Where these differ, as in batches of boxes, it is the number of samples that were drawn for it, if that is known.

    Args:
        batch: of any kind.
        drawn: samples that were drawn for it; augmentations may make more of them, but all tensors then grow alike.

    Raises:
        TypeError: there is no tensor with a batch dimension in it, and `drawn` is not known.
    """
    lengths = [len(tensor) for tensor in _tensors(batch) if tensor.ndim]
    if drawn is not None and len(set(lengths)) != 1:
        return drawn
    if lengths:
        return lengths[0]
    raise TypeError(
        f"there is no tensor with a batch dimension in a batch of type {type(batch).__name__}, so its samples can't be "
        "counted: give the module a loss_count(batch), or HeteroStrategy a loss_count"
    )


def _tensors(batch: Any) -> Iterable[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        for value in batch:
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _tensors(getattr(batch, field.name))
    elif hasattr(batch, "__dict__"):
        yield from (value for value in vars(batch).values() if isinstance(value, Tensor))
