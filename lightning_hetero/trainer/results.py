"""What modules log, made one value on all ranks, in one flat exchange at the points that all ranks reach.

Lightning keeps a value's sum and its number of samples in a collection for each loop. Between two exchanges a rank adds
to its own; an exchange leaves the value over all ranks where Lightning looks for a computed one, so whoever looks at
metrics never communicates.
"""
# ruff: noqa: SLF001 - stands in for what Lightning's collection does inside; a test guards it

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step.snapshot import ModuleSnapshot

Numbers = npt.NDArray[np.float64]

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.max,
    "min": torch.min,
    "Python's sum": sum,
    "Python's max": max,
    "Python's min": min,
}
"""By a name that travels between processes; functions don't stay the same object on their way."""


@dataclass(frozen=True)
class Key:
    """A logged value as all ranks have to know it, those too that have not logged it.

    The fields are those of Lightning's metadata, but for what belongs to a process.
    """

    key: str
    fx: str
    name: str
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduction: str
    enable_graph: bool
    add_dataloader_idx: bool
    dataloader_idx: int | None
    metric_attribute: str | None
    is_tensor: bool
    sync_dist: bool

    @classmethod
    def of(cls, key: str, metric: _ResultMetric) -> "Key":
        """What this rank has registered under a key."""
        meta = metric.meta
        return cls(
            key=key,
            fx=meta.fx,
            name=meta.name,
            prog_bar=meta.prog_bar,
            logger=meta.logger,
            on_step=meta.on_step,
            on_epoch=meta.on_epoch,
            reduction=next(name for name, function in REDUCTIONS.items() if function is meta.reduce_fx),
            enable_graph=meta.enable_graph,
            add_dataloader_idx=meta.add_dataloader_idx,
            dataloader_idx=meta.dataloader_idx,
            metric_attribute=meta.metric_attribute,
            is_tensor=metric.is_tensor,
            sync_dist=meta.sync.should,
        )

    def registered(self, reduce: Callable[..., Any]) -> _ResultMetric:
        """What Lightning would have registered on a rank that logs it, so that it may still do so."""
        meta = _Metadata(
            fx=self.fx,
            name=self.name,
            prog_bar=self.prog_bar,
            logger=self.logger,
            on_step=self.on_step,
            on_epoch=self.on_epoch,
            reduce_fx=REDUCTIONS[self.reduction],
            enable_graph=self.enable_graph,
            add_dataloader_idx=self.add_dataloader_idx,
            dataloader_idx=self.dataloader_idx,
            metric_attribute=self.metric_attribute,
        )
        meta.sync = _Sync(_should=self.sync_dist, fn=reduce)
        return _ResultMetric(meta, self.is_tensor)

    def difference(self, other: "Key") -> str | None:
        """What makes another rank's values under the same key something else; None if nothing does."""
        for field in ("is_tensor", "on_step", "on_epoch", "reduction", "dataloader_idx"):
            own, others = getattr(self, field), getattr(other, field)
            if own != others:
                return f"{field}={own!r} and {field}={others!r}"
        return None


def combined(reduction: str, values: Numbers, weights: Numbers) -> float:
    """One value over all ranks.

    Args:
        reduction: see `REDUCTIONS`.
        values: of the ranks that have one, (n,); for a mean times the weights.
        weights: of the same ranks, (n,); only a mean looks at them.

    Returns:
        NaN for the mean where all weights are 0.
    """
    if reduction.endswith("sum"):
        return float(values.sum())
    if reduction.endswith(("max", "min")):
        return float(values.max() if reduction.endswith("max") else values.min())
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(weights):
        return float("nan")
    means = values / weights
    if (means == means[0]).all():  # exactly what each rank has: a learning rate, an epoch
        return float(means[0])
    return float(values.sum() / weights.sum())


def on_host(numbers: Sequence[Tensor | float]) -> list[float]:
    """Numbers as the host knows them; those on a device are fetched in one piece."""
    away = [i for i, number in enumerate(numbers) if isinstance(number, Tensor) and number.device.type != "cpu"]
    fetched: dict[int, float] = {}
    if away:
        together = torch.stack([torch.as_tensor(numbers[i]).to(torch.float64) for i in away])
        fetched = dict(zip(away, together.tolist(), strict=True))
    return [fetched[i] if i in fetched else float(number) for i, number in enumerate(numbers)]


@dataclass(frozen=True)
class MetricExchange:
    """How ranks talk about logged values.

    Attributes:
        exchange: between all of them.
        waiting: inside of it, time is no work of this rank.
        reduce: the strategy's, as Lightning puts it into what it registers.
        module: the LightningModule, where a rank finds a metric that only others have logged.
        device: of this rank.
    """

    exchange: RankGroup
    waiting: Callable[[], AbstractContextManager[None]]
    reduce: Callable[..., Any]
    module: nn.Module
    device: torch.device


@dataclass(frozen=True)
class StepValue:
    """What this rank has logged in a step.

    Attributes:
        value, weight: see `SynchronizedResults.note`.
        step: in which it was logged, from 1, counted alike on all ranks.
    """

    value: Tensor
    weight: float | Tensor
    step: int


class SynchronizedResults:
    """A loop's collection, whose values become those over all ranks at each exchange.

    Args:
        results: Lightning's.
        talk: with the other ranks.
    """

    def __init__(self, results: _ResultCollection, talk: MetricExchange) -> None:
        self._results = results
        self._talk = talk
        self._keys: dict[str, Key] = {}  # the same on all ranks, in the same order
        self._own: dict[str, StepValue] = {}
        self._states: dict[str, ModuleSnapshot] = {}  # of metrics at the end of their loader, where there are several
        self._step = self._shared_steps = 0

    @property
    def keys(self) -> list[Key]:
        """What any rank had logged by the last exchange."""
        return list(self._keys.values())

    def next_step(self) -> None:
        """A training step begins: on all ranks."""
        self._step += 1

    def note(self, key: str, value: Tensor, weight: float | Tensor) -> None:
        """This rank has logged a value in this step.

        Args:
            key: under which.
            value: of this rank.
            weight: in the mean over ranks; 0 leaves it out of any reduction. May be on the device.
        """
        self._own[key] = StepValue(value, weight, self._step)

    def exchange_epoch(self) -> None:
        """Values on epoch level become those over all ranks, for each key that any rank has logged since the last time.

        Raises:
            ValueError: ranks mean different things by one key.
            TypeError: this rank has not got a metric that others have logged.
        """
        rank = self._talk.exchange.rank
        metrics = []
        for key, rows in self._together(lambda key: key.on_epoch, self._epoch_rows):
            if not rows[:, 0].any():
                continue
            metric = self._metric(key)
            if not key.is_tensor:
                metrics.append((metric, self._state(key, logged=bool(rows[rank, 1])), bool(rows[:, 2].any())))
                continue
            present = rows[rows[:, 1] > 0]
            metric._computed = self._tensor(metric, combined(key.reduction, present[:, 2], present[:, 3]), present)  # type: ignore[assignment] # torchmetrics says only what it is at first
            metric.has_reset = False
        self._states.clear()
        for metric, state, updated in metrics:
            with self._talk.waiting():
                self._compute(metric, state, updated=updated)

    def exchange_steps(self) -> None:
        """Values on step level become those over all ranks, until the next exchange.

        Raises:
            ValueError: ranks mean different things by one key.
        """
        self._shared_steps = self._step
        for key, rows in self._together(lambda key: key.on_step and key.is_tensor, self._step_rows):
            if not rows[:, 1].any():
                continue
            # A key that is logged now and then keeps its last value, and only those who logged it last have that one.
            latest = rows[rows[:, 0] == rows[:, 0].max()]
            latest = latest[latest[:, 3] > 0]
            metric = self._metric(key)
            metric.has_reset = False
            value = combined(key.reduction, latest[:, 2], latest[:, 3]) if len(latest) else None
            metric._forward_cache = self._tensor(metric, value, latest) if value is not None else None

    def own_values(self) -> Iterator[tuple[_ResultMetric, Tensor]]:
        """What this rank has logged in steps since the last exchange."""
        for key, own in self._own.items():
            metric = self._results[key]
            if own.step > self._shared_steps and not metric.has_reset and not _is_zero(own.weight):
                yield metric, own.value

    def loader_over(self) -> None:
        """This rank has no more batches of a loader: what later ones add to the same metrics is not of this one."""
        for key, metric in self._results.valid_items():
            if not metric.is_tensor and metric.meta.dataloader_idx is not None:
                self._states[key] = ModuleSnapshot(metric.value)

    @staticmethod
    def cached(metric: _ResultMetric, on_step: bool) -> Tensor | None:
        """In place of the collection's `_get_cache`, which computes, and so communicates, where nothing is cached."""
        epoch = not on_step and metric.meta.on_epoch and not metric.meta.sync.rank_zero_only
        if epoch and metric._computed is None:
            return None
        return _ResultCollection._get_cache(metric, on_step)

    # ---- the flat exchange ----

    def _together(
        self, wanted: Callable[[Key], bool], rows_of: Callable[[list[Key]], list[list[float]]]
    ) -> list[tuple[Key, Numbers]]:
        """Rows of all ranks, (W, 4), for each wanted key that any rank has.

        Keys that some rank has met for the first time cost a second exchange, once.
        """
        known = [key for key in self._keys.values() if wanted(key)]
        new = [
            Key.of(name, metric)
            for name, metric in self._results.items()
            if name not in self._keys and not metric.meta.sync.rank_zero_only
        ]
        own = [number for row in rows_of(known) for number in row]
        with self._talk.waiting():
            table = self._talk.exchange.table([len(new), *own])
            told = self._talk.exchange.gather(list(zip(new, rows_of(new), strict=True))) if table[:, 0].any() else []
        found = [(key, table[:, 1 + 4 * i : 5 + 4 * i]) for i, key in enumerate(known)]
        world_size = len(table)
        for name, key in self._agreed(told).items():
            rows = np.zeros((world_size, 4))
            for rank, pairs in enumerate(told):
                for other, row in pairs:
                    if other.key == name:
                        rows[rank] = row
            self._keys[name] = key
            if wanted(key):
                found.append((key, rows))
        return found

    @staticmethod
    def _agreed(told: Sequence[Sequence[tuple[Key, list[float]]]]) -> dict[str, Key]:
        """The union of new keys, in the order of ranks and of what each logged first."""
        union: dict[str, tuple[int, Key]] = {}
        for rank, pairs in enumerate(told):
            for key, _ in pairs:
                first, same = union.setdefault(key.key, (rank, key))
                if difference := same.difference(key):
                    raise ValueError(
                        f"ranks {first} and {rank} log {key.name!r} in different ways ({difference}): call self.log "
                        "with the same arguments on all ranks, or under another name"
                    )
        return {name: key for name, (_, key) in union.items()}

    def _epoch_rows(self, keys: list[Key]) -> list[list[float]]:
        """For each key: not exchanged yet; bytes of a number, 0 for none; sum (for metrics: updated); weight."""
        return self._rows([self._epoch_row(key) for key in keys])

    def _epoch_row(self, key: Key) -> list[Tensor | float]:
        metric = self._results.get(key.key)
        if metric is None or metric.has_reset or not key.on_epoch:
            return [0.0, 0.0, 0.0, 0.0]
        stale = float(metric._computed is None)
        if not key.is_tensor:
            return [stale, 1.0, float(metric.value.update_called), 0.0]
        weight = metric.cumulated_batch_size if metric.meta.is_mean_reduction else 1.0
        return [stale, float(metric.value.element_size()), metric.value, weight]

    def _step_rows(self, keys: list[Key]) -> list[list[float]]:
        """For each key: the step in which it was logged last, from 1; bytes of a number, 0 for none; sum; weight."""
        return self._rows([self._step_row(key) for key in keys])

    def _step_row(self, key: Key) -> list[Tensor | float]:
        own = self._own.get(key.key)
        if own is None or self._results[key.key].has_reset:
            return [0.0, 0.0, 0.0, 0.0]
        value: Tensor | float = own.value
        if key.reduction == "mean":
            value = own.value.double() * own.weight if not _is_zero(own.weight) else 0.0
        return [float(own.step), float(own.value.element_size()), value, own.weight]

    @staticmethod
    def _rows(rows: list[list[Tensor | float]]) -> list[list[float]]:
        flat = on_host([number for row in rows for number in row])
        return [flat[first : first + 4] for first in range(0, len(flat), 4)]

    # ---- this rank's side of it ----

    def _metric(self, key: Key) -> _ResultMetric:
        """What is registered here under a key, as if this rank had logged it."""
        if key.key not in self._results:
            metric = key.registered(self._talk.reduce)
            if not key.is_tensor:
                metric.value = self._find(key)
            self._results[key.key] = metric
            if key.is_tensor:
                metric.to(self._talk.device)
        found: _ResultMetric = self._results[key.key]
        return found

    def _find(self, key: Key) -> Metric:
        found = None
        if key.metric_attribute is not None:
            try:
                found = self._talk.module.get_submodule(key.metric_attribute)
            except AttributeError:
                found = None
        if not isinstance(found, Metric):
            raise TypeError(
                f"rank {self._talk.exchange.rank} ({self._talk.device}) has to compute the metric {key.name!r}, which "
                f"other ranks have logged, but its module has no metric under {key.metric_attribute!r}: make the same "
                "metrics on all ranks"
            )
        return found

    @staticmethod
    def _tensor(metric: _ResultMetric, value: float, rows: Numbers) -> Tensor:
        dtype = torch.float64 if len(rows) and rows[:, 1].max() == torch.float64.itemsize else torch.float32
        return torch.tensor(value, dtype=dtype, device=metric.value.device)

    def _state(self, key: Key, *, logged: bool) -> ModuleSnapshot | None:
        """The state in which a metric is computed, where it is not the current one.

        Args:
            key: of the metric.
            logged: by this rank.
        """
        if logged or key.dataloader_idx is None:
            return self._states.get(key.key)
        metric = self._metric(key).value
        current = ModuleSnapshot(metric)  # it may hold what another loader has added
        metric.reset()
        empty = ModuleSnapshot(metric)
        current.restore()
        return empty

    @staticmethod
    def _compute(metric: _ResultMetric, state: ModuleSnapshot | None, *, updated: bool) -> None:
        """Compute a metric, which brings its states together, on all ranks alike.

        Args:
            metric: what was logged.
            state: see `_state`.
            updated: on any rank; where it was not on this one, that is nothing to warn of.
        """
        current = ModuleSnapshot(metric.value) if state is not None else None
        if state is not None:
            state.restore()
        for part in metric.value.modules():
            if isinstance(part, Metric):
                part._computed = None  # a value that is kept on some ranks only would leave the others waiting
        with warnings.catch_warnings():
            if updated:
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            metric._computed = metric.value.compute()
        metric.has_reset = False
        if current is not None:
            current.restore()


def _is_zero(weight: float | Tensor) -> bool:
    """Whether the host knows a weight to be 0; it does not ask the device."""
    return not isinstance(weight, Tensor) and weight == 0
