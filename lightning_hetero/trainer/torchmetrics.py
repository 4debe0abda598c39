"""Synchronizes torchmetrics over ranks, wherever a metric is held, and also where a rank has nothing to contribute.

torchmetrics gathers each tensor of a state by itself. Where a metric keeps one tensor per image, ranks with different
numbers of images would issue different numbers of gathers, and hang; and a rank without any sample knows neither the
shape nor the type that the first update gives a state.
"""
# ruff: noqa: SLF001 - torchmetrics has no public way to say how states are gathered

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities.data import dim_zero_cat

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step.snapshot import ModuleSnapshot


class MetricSync:
    """Gathers the states of metrics in a run with several ranks; `sync` is in place of `Metric.sync` meanwhile.

    A metric with a `dist_sync_fn`, a `process_group` or a synchronization of its own is gathered as it says. `timer` is
    stopped while ranks gather.
    """

    def __init__(self, group: RankGroup, timer: ComputeTimer) -> None:
        self._group, self._timer = group, timer
        self._torchmetrics_sync = Metric.sync
        self._borrowed: ModuleSnapshot | None = None
        self._uncached: list[Metric] = []

    def close(self) -> None:
        """The run is over: metrics keep what they compute, as before."""
        for metric in self._uncached:
            metric.compute_with_cache = True
        self._uncached.clear()

    def begin_borrowed(self, before: ModuleSnapshot) -> None:
        """This rank's batch is another rank's: until `end_borrowed`, metrics count as they were `before` it."""
        self._borrowed = before

    def end_borrowed(self) -> None:
        """The batch is over."""
        self._borrowed = None

    def sync(
        self,
        metric: Metric,
        dist_sync_fn: Any = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        """Replace a metric's states by those over all ranks, and keep its own for `Metric.unsync`."""
        available = distributed_available or metric.distributed_available_fn
        own_sync = type(metric)._sync_dist not in (Metric._sync_dist, MeanAveragePrecision._sync_dist)
        own_group = dist_sync_fn is not None or process_group is not None or metric.process_group is not None
        with self._timer.waiting():
            if own_sync or own_group or metric._is_synced or not should_sync:
                self._torchmetrics_sync(metric, dist_sync_fn, process_group, should_sync, distributed_available)
            elif callable(available) and available():
                if metric.compute_with_cache:
                    # A rank whose metric was not updated since would return what it has kept, and leave others waiting.
                    metric.compute_with_cache = False
                    self._uncached.append(metric)
                cache = metric._copy_state_dict()
                if metric._reductions:
                    self._gather_states(metric)
                metric._cache, metric._is_synced = cache, True

    def _gather_states(self, metric: Metric) -> None:
        saved = self._borrowed.state_of(metric) if self._borrowed is not None else None
        state: Mapping[str, Any] = saved if saved is not None else vars(metric)
        own = {name: _to(state[name], "cpu") for name in metric._reductions}
        # A metric whose updates were all undone has a count below 1, see `ModuleSnapshot.undo`.
        ranks = self._group.gather((state["_update_count"] >= 1, own))
        updated = [states for is_updated, states in ranks if is_updated] or [states for _, states in ranks]
        for name, reduction in metric._reductions.items():
            current = getattr(metric, name)
            first = current[0] if isinstance(current, list) and current else current
            device = first.device if isinstance(first, Tensor) else metric.device
            setattr(metric, name, _to(_merged([states[name] for states in updated], reduction), device))


def _to(value: Any, device: torch.device | str) -> Any:
    """A state on a device; entries that are no tensors (encoded masks) stay as they are."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return [_to(entry, device) for entry in value] if isinstance(value, list) else value


def _merged(values: Sequence[Any], reduction: Any) -> Any:
    """One state from those of several ranks, as torchmetrics makes it: a list of all entries, or stacked tensors."""
    if any(isinstance(value, list) for value in values):
        entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
        if reduction is None or (reduction is dim_zero_cat and not entries):
            return entries
        return reduction(entries)
    stacked = _stacked(values)  # (ranks, *shape)
    return stacked if reduction is None else reduction(stacked)


def _stacked(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of any types in one, in the type that holds them all."""
    tensors = list(tensors)
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.stack([tensor.to(dtype) for tensor in tensors])
