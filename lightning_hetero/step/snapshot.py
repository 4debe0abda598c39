"""Saves what a training step changes besides gradients, so that it can be restored."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm

_METRIC_ATTRIBUTES = ("_update_count", "_computed", "_forward_cache")
"""Attributes of a torchmetrics metric besides its states."""


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
            self.restore_metric(metric)

    def restore_metric(self, metric: Metric) -> None:
        """Restore the saved state of one of the metrics; the others, and buffers, stay as they are."""
        for name, value in self._states.get(id(metric), {}).items():
            setattr(metric, name, _copied(value))


def _copied(value: Any) -> Any:
    """A deep copy, detached, since tensors with a graph can't be deep-copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)([_copied(entry) for entry in value])
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return copy.deepcopy(value)
