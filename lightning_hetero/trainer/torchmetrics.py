"""torchmetrics over ranks that have evaluated different numbers of batches, images, or nothing at all.

torchmetrics gathers each tensor in a list state by itself. Where a metric keeps one tensor per image, ranks with
different numbers of images would issue different numbers of gathers, and wait for each other for ever; a rank without
any can't tell the shape and type of what it gathers; and one that computes before it was updated warns.
"""
# ruff: noqa: SLF001 - torchmetrics has no public way to say how list states are gathered

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_hetero.exchange.groups import RankGroup


def _to(values: Iterable[Any], device: torch.device | str) -> list[Any]:
    """The entries of a list state on a device; tuples, as of encoded masks, are left as they are."""
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


class _Synced:
    """Stands before one metric's `_sync_dist` and `compute`.

    Args:
        metric: whose.
        exchange: between the ranks.
        apart: whether the rank is in a step that other ranks may not have.
    """

    def __init__(self, metric: Metric, exchange: RankGroup, apart: Callable[[], bool]) -> None:
        self.metric = metric
        self._exchange = exchange
        self._apart = apart
        self._compute = metric.compute

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Synced":
        # A copy of a metric (`Metric.clone`, MetricTracker) has this for itself. torchmetrics gives copies a `compute`
        # of their own afterwards.
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        metric = memo.get(id(self.metric), self.metric)
        vars(copied).update(metric=metric, _exchange=self._exchange, _apart=self._apart, _compute=self._compute)
        return copied

    def __reduce__(self) -> Any:
        return _without_exchange, (self.metric,)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """In place of `Metric.compute`."""
        metric = self.metric
        if not metric._to_sync or metric._is_synced or metric._computed is not None:
            return self._compute(*args, **kwargs)
        if self._apart():
            metric._to_sync = False
            try:
                return self._compute(*args, **kwargs)
            finally:
                metric._to_sync, metric._computed = True, None
        if any(self._exchange.gather(metric.update_called)):
            metric._update_count = max(metric._update_count, 1)
        return self._compute(*args, **kwargs)

    def __call__(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """In place of `Metric._sync_dist`: list states of any length, in the order of the ranks."""
        metric = self.metric
        lists = {name: value for name in metric._reductions if isinstance(value := getattr(metric, name), list)}
        ranks = self._exchange.gather({name: self._told(name, value) for name, value in lists.items()})
        for name, value in lists.items():
            if metric._reductions[name] is None:
                setattr(metric, name, [])  # nothing for torchmetrics to gather
            elif not value:
                setattr(metric, name, self._nothing_of(told for rank in ranks if (told := rank[name])))
        options = {"dist_sync_fn": dist_sync_fn} if dist_sync_fn is not None else {}
        type(metric)._sync_dist(metric, **options, process_group=process_group)
        for name, value in lists.items():
            if metric._reductions[name] is None:
                device = value[0].device if value and isinstance(value[0], Tensor) else metric.device
                setattr(metric, name, _to((entry for rank in ranks for entry in rank[name]), device))

    def _told(self, name: str, value: list[Any]) -> Any:
        """What the other ranks need of a list state: its entries, or what they look like where torchmetrics does it."""
        if self.metric._reductions[name] is None:
            return _to(value, "cpu")
        if self.metric._reductions[name] is dim_zero_cat and value:
            return value[0].dtype, tuple(value[0].shape[1:])
        return None

    def _nothing_of(self, told: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """No samples, of the shape and type that other ranks have."""
        return [torch.empty((0, *shape), dtype=dtype, device=self.metric.device) for dtype, shape in told][:1]


def _without_exchange(metric: Metric) -> Any:
    """What is left of a metric's own gathering in another process: torchmetrics' own."""
    return type(metric)._sync_dist.__get__(metric)


class MetricSync:
    """All metrics of a module.

    Args:
        exchange: between the ranks.
        apart: whether the rank is in a step that other ranks may not have; values stay the rank's own then.
    """

    def __init__(self, exchange: RankGroup, apart: Callable[[], bool]) -> None:
        self._exchange = exchange
        self._apart = apart
        self._synced: list[_Synced] = []

    def attach(self, module: torch.nn.Module) -> Self:
        """Take over the metrics that are not yet; those that the user gathers in his own way are left alone."""
        there = {id(metric) for metric in module.modules()}
        self._synced = [synced for synced in self._synced if id(synced.metric) in there]  # hooks may replace metrics
        known = {id(synced.metric) for synced in self._synced}
        for metric in module.modules():
            if (
                isinstance(metric, Metric)
                and metric._reductions
                and id(metric) not in known
                and metric.dist_sync_fn is None
                and metric.process_group is None
            ):
                synced = _Synced(metric, self._exchange, self._apart)
                vars(metric).update(_sync_dist=synced, compute=synced.compute)
                self._synced.append(synced)
        return self

    def detach(self) -> None:
        """Leave the metrics as they were."""
        for synced in self._synced:
            vars(synced.metric).pop("_sync_dist", None)
            vars(synced.metric)["compute"] = synced._compute
        self._synced.clear()
