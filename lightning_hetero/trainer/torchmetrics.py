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
from lightning_hetero.exchange.calls import OF_USER
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
        self._batch_states: dict[int, tuple[Metric, dict[str, Any]]] = {}  # by id, since a metric's hash changes

    def close(self) -> None:
        """The run is over: metrics keep what they compute, as before."""
        for metric in self._uncached:
            metric.compute_with_cache = True
        self._uncached.clear()

    def begin_batch(self, before_borrowed: ModuleSnapshot | None) -> None:
        """A batch begins; if it is another rank's, metrics count as they were before it until `end_batch`."""
        self._borrowed = before_borrowed
        self._batch_states.clear()

    def end_batch(self) -> None:
        """The batch is over, and what borrowed samples have changed is undone."""
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
        in_forward = not should_sync and not metric._should_unsync  # which computes the value of this batch
        if in_forward and self._borrowed is None:
            self._batch_states[id(metric)] = metric, {name: getattr(metric, name) for name in metric._reductions}
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
                    call = self._group.waits.call(f"{type(metric).__name__}.compute", OF_USER)
                    _set_states(metric, self._group.gather(self._contribution(metric), call))
                metric._cache, metric._is_synced = cache, True

    def batch_values(self, metrics: Sequence[Metric]) -> list[Any]:
        """What the last `forward` of these metrics would have returned for the batches of all ranks together.

        All ranks call this with the same metrics; None for one that has computed no batch on any rank.
        """
        batches = [self._batch_states.get(id(metric)) for metric in metrics]
        own = [_on_host(batch[1]) if batch is not None else None for batch in batches]
        with self._timer.waiting():
            ranks = self._group.gather(own, "the step values of metrics")
        values: list[Any] = []
        for metric, states in zip(metrics, zip(*ranks, strict=True), strict=True):
            of_ranks = [(True, of_rank) for of_rank in states if of_rank is not None]
            values.append(_computed(metric, of_ranks) if of_ranks else None)
        return values

    def _contribution(self, metric: Metric) -> tuple[bool, dict[str, Any]]:
        """Whether this rank has updated a metric, and its states; none of samples that it has borrowed."""
        state: Mapping[str, Any] = vars(metric)
        if self._borrowed is not None:
            if not metric._should_unsync:  # in `forward`, where the state is that of this batch
                return False, _on_host({name: state[name] for name in metric._reductions})
            state = self._borrowed.state_of(metric) or state
        # A metric whose updates were all undone has a count below 1, see `ModuleSnapshot.undo`.
        return state["_update_count"] >= 1, _on_host({name: state[name] for name in metric._reductions})


def _on_host(states: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _to(state, "cpu") for name, state in states.items()}


def _set_states(metric: Metric, ranks: Sequence[tuple[bool, Mapping[str, Any]]]) -> None:
    """Give a metric the states over all ranks that have updated it."""
    updated = [states for is_updated, states in ranks if is_updated] or [states for _, states in ranks]
    for name, reduction in metric._reductions.items():
        current = getattr(metric, name)
        first = current[0] if isinstance(current, list) and current else current
        device = first.device if isinstance(first, Tensor) else metric.device
        setattr(metric, name, _to(_merged([states[name] for states in updated], reduction), device))


def _computed(metric: Metric, ranks: Sequence[tuple[bool, Mapping[str, Any]]]) -> Any:
    """The value of a metric with the states of all ranks; the metric stays as it is."""
    names = (*metric._reductions, "_update_count", "_computed", "_to_sync", "_cache")
    before = {name: getattr(metric, name) for name in names}
    try:
        _set_states(metric, ranks)
        metric._update_count, metric._computed, metric._to_sync = 1, None, False
        return metric.compute()
    finally:
        for name, value in before.items():
            setattr(metric, name, value)


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
