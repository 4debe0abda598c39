"""Saves what a training step changes besides gradients, so that it can be restored."""

# ruff: noqa: SLF001 - a metric has no public names for this

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm

_METRIC_ATTRIBUTES = ("_update_count", "_computed", "_forward_cache")
"""Attributes of a torchmetrics metric besides its states."""


_UNDONE = 0.5
"""The update count of a metric whose updates were all undone: any number between 0 and 1."""


class ModuleSnapshot:
    """Copies of what a forward pass changes in a module: its buffers, and the states of its torchmetrics.

    Running statistics of synchronized BatchNorm are left out: they depend on the counted samples of all ranks only.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            (layer, name, buffer, buffer.detach().clone())
            for layer in module.modules()
            if not isinstance(layer, SynchronizedBatchNorm)
            for name, buffer in layer.named_buffers(recurse=False)
        ]
        self._metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        self._states = {  # by id, since a metric's hash depends on its state
            id(metric): {name: _copied(getattr(metric, name)) for name in (*metric.metric_state, *_METRIC_ATTRIBUTES)}
            for metric in self._metrics
        }

    def restore(self) -> None:
        """Restore the saved values."""
        with torch.no_grad():
            for layer, name, buffer, value in self._buffers:
                buffer.copy_(value)
                setattr(layer, name, buffer)  # a step may have put another tensor in its place
        for metric in self._metrics:
            for name, value in self._states[id(metric)].items():
                setattr(metric, name, _copied(value))

    def undo(self) -> None:
        """Restore the saved values after a batch that counts on other ranks only: their metrics have been updated.

        So a metric's cached value stays what the batch has made it, as on the other ranks, or some would wait for
        others that don't compute; and a metric counts as updated, but by less than one update, so that computing it
        does not warn.
        """
        cached = [metric._computed for metric in self._metrics]
        self.restore()
        for metric, value in zip(self._metrics, cached, strict=True):
            metric._computed = value
            metric._update_count = max(metric._update_count, _UNDONE)  # type: ignore[assignment] # torchmetrics counts up

    def state_of(self, metric: Metric) -> Mapping[str, Any] | None:
        """What was saved of a metric; None if it is not part of the module."""
        return self._states.get(id(metric))


def _copied(value: Any) -> Any:
    """A deep copy, detached, since tensors with a graph can't be deep-copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)([_copied(entry) for entry in value])
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return copy.deepcopy(value)
