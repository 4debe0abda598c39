"""The loss count of a batch, which is the number that its loss is averaged over, and the weight of a rank's loss.

The rule is chosen once per run, in this order: the user's callable, the module's own `loss_count`, the rules for
TorchGeo's tasks, the number of samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_hetero.step.batch_contents import sample_count
from lightning_hetero.step.torchgeo import IMAGE_TASKS, TARGETS, task_name, unchanged_task

Count = float | Tensor
"""A number, or a 0-d tensor on the module's device."""

_DEFAULT_IGNORE_INDICES = (-100, -1000)
"""The default `ignore_index` in torch, and in TorchGeo's tasks."""


@dataclass(frozen=True)
class LossCounter:
    """How batches are counted in this run."""

    rule: str  # description of what is counted, for warnings and errors
    count: Callable[[Any, Any], Count] | None = None  # from the module and a batch; None counts its samples
    advice: str = ""  # how to make the rule exact if it is only a guess

    def __call__(self, module: nn.Module, batch: Any, samples: int | None = None) -> Count:
        """The loss count of a batch as `training_step` gets it; `samples` is how many it holds, if known.

        Raises:
            TypeError: the rule returned something that is neither a number nor a tensor without dimensions.
        """
        if self.count is not None:
            value = self.count(module, batch)
        else:
            value = sample_count(batch) if samples is None else samples
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


def find_loss_counter(module: nn.Module, given: Callable[[Any, Any], Count] | None) -> LossCounter:
    """The rule for `module`; `given` is the strategy's `loss_count` option, if any."""
    if given is not None:
        return LossCounter("the strategy's loss_count", given)
    if callable(getattr(module, "loss_count", None)):
        return LossCounter("the module's loss_count", lambda owner, batch: owner.loss_count(batch))
    return _torchgeo_rule(module) or LossCounter("samples", advice=_advice(module))


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
        criterion: the module's loss, with its `ignore_index` and `weight`.
        target: class indices of any shape, or class probabilities.
    """
    if target.is_floating_point():  # class probabilities: the mean is over everything but the class dimension
        return float(target.numel() // target.shape[1] if target.ndim > 1 else target.numel())
    valid = target != int(criterion.ignore_index)
    weight = criterion.weight
    if not isinstance(weight, Tensor):
        return valid.sum()
    classes = torch.where(valid, target, 0)
    return (weight.double()[classes] * valid).sum()


def _advice(module: nn.Module) -> str:
    names = [
        name
        for name, loss in module.named_modules()
        if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
        and (loss.weight is not None or loss.ignore_index not in _DEFAULT_IGNORE_INDICES)
    ]
    if not names:
        return ""
    return (
        f"{type(module).__name__}.{names[0]} averages over valid or class-weighted targets, but batches are counted by "
        "samples, so the gradient is only approximately that of the global batch. To make it exact, give the module\n"
        "    def loss_count(self, batch):\n"
        "        return lightning_hetero.cross_entropy_count(self."
        f"{names[0]}, batch['mask'])  # the targets, as training_step gets them"
    )


def loss_weight(counts: Sequence[float] | NDArray[np.float64], rank: int) -> float:
    """The factor on the loss of `rank` that turns DDP's plain mean into the count-weighted mean.

    `w_r = W * c_r / sum(c)`: the mean over ranks of `w_r` times the gradient of rank r's mean loss is the gradient of
    the mean over the whole global batch. 0 if the count is 0 on every rank.

    Args:
        counts: W loss counts, finite and at least 0.
        rank: the rank whose weight is returned.
    """
    total = float(sum(counts))
    return len(counts) * float(counts[rank]) / total if total > 0 else 0.0
