"""A step on borrowed samples leaves no trace on its rank: what it changed is put back."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm


class ModuleSnapshot:
    """What a forward pass changes in a module without being asked to: buffers and torchmetrics' states.

    Synchronised statistics are left out: they follow the other ranks' samples, not the borrowed ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [
            (buffer, buffer.detach().clone())
            for layer in module.modules()
            if not isinstance(layer, SynchronizedBatchNorm)
            for buffer in layer.buffers(recurse=False)
        ]
        self._metrics = [
            (metric, {name: _copied(getattr(metric, name)) for name in _metric_state(metric)})
            for metric in module.modules()
            if isinstance(metric, Metric)
        ]

    def restore(self) -> None:
        """Put it back."""
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for metric, state in self._metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _copied(value: Any) -> Any:
    """A copy that later changes in place don't reach; tensors may hang in a graph, which can't be deep-copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)([_copied(entry) for entry in value])
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return copy.deepcopy(value)


def _metric_state(metric: Metric) -> list[str]:
    state: dict[str, Any] = metric.metric_state
    return [*state, *(name for name in ("_update_count", "_computed", "_forward_cache") if hasattr(metric, name))]
