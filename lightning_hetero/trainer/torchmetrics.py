"""Synchronizes torchmetrics over ranks that have evaluated different numbers of batches or images, or none.

torchmetrics gathers each tensor in a list state by itself. Where a metric keeps one tensor per image, ranks with
different numbers of images would issue different numbers of gathers, and hang; a rank without any image knows neither
the shape nor the type to gather; and a metric that computes without an update warns.
"""
# ruff: noqa: SLF001 - torchmetrics has no public way to say how states are gathered

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step.snapshot import ModuleSnapshot


class _SynchronizedMetric:
    """Replaces one metric's `_sync_dist` and `compute`."""

    def __init__(self, metric: Metric, sync: "MetricSync") -> None:
        self.metric = metric
        self._sync = sync
        self._compute = metric.compute
        self._has_custom_sync = metric.dist_sync_fn is not None or metric.process_group is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SynchronizedMetric":
        # A copy of a metric (`Metric.clone`, MetricTracker) gets a copy of this. torchmetrics then gives the metric a
        # `compute` of its own.
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self) | {"metric": memo.get(id(self.metric), self.metric)})
        return copied

    def __reduce__(self) -> Any:
        return _plain_sync_dist, (self.metric,)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """In place of `Metric.compute`."""
        metric = self.metric
        if self._has_custom_sync or not metric._to_sync or metric._is_synced or metric._computed is not None:
            return self._compute(*args, **kwargs)
        if self._sync.in_evaluation_batch():
            metric._to_sync = False
            try:
                return self._compute(*args, **kwargs)
            finally:
                metric._to_sync, metric._computed = True, None
        with self._without_borrowed():
            with self._sync.timer.waiting():
                updated = any(self._sync.group.gather(metric.update_called))
            if updated:
                metric._update_count = max(metric._update_count, 1)
            return self._compute(*args, **kwargs)

    @contextmanager
    def _without_borrowed(self) -> Iterator[None]:
        """Inside, the metric has no state of samples that this rank has borrowed from others."""
        metric, before = self.metric, self._sync.before_borrowed
        if before is None:
            yield
            return
        current = ModuleSnapshot(metric)
        if metric._should_unsync:
            before.restore_metric(metric)
        else:  # in `forward`, where the state is that of this batch only
            metric.reset()
        metric._computed = None  # a value that is kept on some ranks only would leave the others waiting
        try:
            yield
        finally:
            current.restore()

    def __call__(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """In place of `Metric._sync_dist`: gathers list states of any length, in the order of the ranks."""
        with self._sync.timer.waiting():
            if self._has_custom_sync:
                type(self.metric)._sync_dist(self.metric, dist_sync_fn, process_group)
            else:
                self._gather_states(dist_sync_fn, process_group)

    def _gather_states(self, dist_sync_fn: Any, process_group: Any) -> None:
        metric = self.metric
        lists = {name: value for name in metric._reductions if isinstance(value := getattr(metric, name), list)}
        ranks = self._sync.group.gather({name: self._description(name, value) for name, value in lists.items()})
        for name, value in lists.items():
            if metric._reductions[name] is None:
                setattr(metric, name, [])  # torchmetrics then gathers nothing
            elif not value:
                setattr(metric, name, self._no_samples(filter(None, (rank[name] for rank in ranks))))
        options = {"dist_sync_fn": dist_sync_fn} if dist_sync_fn is not None else {}
        type(metric)._sync_dist(metric, **options, process_group=process_group)
        for name, value in lists.items():
            if metric._reductions[name] is None:
                device = value[0].device if value and isinstance(value[0], Tensor) else metric.device
                setattr(metric, name, _to((entry for rank in ranks for entry in rank[name]), device))

    def _description(self, name: str, value: list[Any]) -> Any:
        """What other ranks need of a list state: its entries, or their type and shape where torchmetrics gathers."""
        if self.metric._reductions[name] is None:
            return _to(value, "cpu")
        if self.metric._reductions[name] is dim_zero_cat and value:
            return value[0].dtype, tuple(value[0].shape[1:])
        return None

    def _no_samples(self, descriptions: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """An empty tensor of the shape and type that other ranks have."""
        return [torch.empty((0, *shape), dtype=dtype, device=self.metric.device) for dtype, shape in descriptions][:1]


def _to(entries: Iterable[Any], device: torch.device | str) -> list[Any]:
    """The entries of a list state on a device; entries that are no tensors (encoded masks) stay as they are."""
    return [entry.to(device) if isinstance(entry, Tensor) else entry for entry in entries]


def _plain_sync_dist(metric: Metric) -> Any:
    """What a pickled metric gets in place of our synchronization: that of torchmetrics."""
    return type(metric)._sync_dist.__get__(metric)


@dataclass
class MetricSync:
    """Synchronizes all metrics of a module; with one rank it does nothing.

    In an evaluation batch, which other ranks may not have, values stay the rank's own.
    """

    group: RankGroup
    timer: ComputeTimer  # stopped while ranks gather
    in_evaluation_batch: Callable[[], bool]
    before_borrowed: ModuleSnapshot | None = field(default=None, init=False)
    """The module's metrics before the current training step, if this rank computes borrowed samples in it."""
    _synchronized: list[_SynchronizedMetric] = field(default_factory=list, init=False)

    def begin_batch(self, before_borrowed: ModuleSnapshot | None) -> None:
        """A training batch begins; see `before_borrowed`."""
        self.before_borrowed = before_borrowed

    def end_batch(self) -> None:
        """The training step is over, and what borrowed samples have changed is undone."""
        self.before_borrowed = None

    def attach(self, module: torch.nn.Module) -> None:
        """Synchronize new metrics; where the user gathers a metric's states, only stop the timer meanwhile."""
        if self.group.world_size == 1:
            return
        present = {id(metric) for metric in module.modules()}
        self._synchronized = [one for one in self._synchronized if id(one.metric) in present]  # hooks may replace some
        known = {id(one.metric) for one in self._synchronized}
        for metric in module.modules():
            if isinstance(metric, Metric) and metric._reductions and id(metric) not in known:
                one = _SynchronizedMetric(metric, self)
                vars(metric).update(_sync_dist=one, compute=one.compute)
                self._synchronized.append(one)

    def detach(self) -> None:
        """Leave the metrics as they were."""
        for one in self._synchronized:
            vars(one.metric).pop("_sync_dist", None)
            vars(one.metric)["compute"] = one._compute
        self._synchronized.clear()
