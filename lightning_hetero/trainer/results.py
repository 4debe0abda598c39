"""Logged values become the same on all ranks, in one exchange at the points that all ranks reach.

Lightning keeps a value's sum and its number of samples in a collection for each loop. Between two exchanges a rank adds
to its own; an exchange puts the value over all ranks where Lightning looks for a computed one, so reading metrics never
communicates.
"""
# ruff: noqa: SLF001 - it overrides the private parts of Lightning's collection; a test guards them

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step.batch_contents import sample_count_or_one
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.trainer.logged_values import COLUMNS, LoggedKey, Numbers, combined, on_host, union
from lightning_hetero.trainer.torchmetrics import MetricSync

LOGGED_VALUES = "an exchange of logged values"
"""What errors call it."""


@dataclass(frozen=True)
class MetricExchange:
    """How ranks exchange logged values."""

    group: RankGroup
    timer: ComputeTimer  # stopped while ranks exchange
    reduce: Callable[..., Any]  # the strategy's, which Lightning stores with each metric
    module: nn.Module  # where a rank looks up a metric that only others have logged
    device: torch.device

    @property
    def is_needed(self) -> bool:
        """Whether there are other ranks; without them everything is as Lightning has it."""
        return self.group.world_size > 1


class SynchronizedResults(_ResultCollection):
    """Lightning's collection of a loop's logged values; each exchange replaces them by those over all ranks."""

    def __init__(self, exchange: MetricExchange, *, training: bool) -> None:
        super().__init__(training)
        self._exchange = exchange
        self._keys: dict[str, LoggedKey] = {}  # the same on all ranks, in the same order
        self._samples: int | None = None  # of this rank's batch, if that is known
        self._batches = self._samples_seen = 0  # of this rank, in this epoch or evaluation

    @property
    def logged_keys(self) -> list[LoggedKey]:
        """What any rank had logged by the last exchange."""
        return list(self._keys.values())

    def begin_epoch(self) -> None:
        """An epoch or an evaluation begins, or the last one is over."""
        self._batches = self._samples_seen = 0

    def count_batch(self, batch: Any, samples: int | None) -> None:
        """A batch was loaded, with so many samples of this rank's; None if their number is not known."""
        self._samples = samples
        self._batches += 1
        self._samples_seen += sample_count_or_one(batch) if samples is None else samples

    @override
    def _extract_batch_size(self, value: _ResultMetric, batch_size: int | None, meta: _Metadata) -> int:
        """As Lightning's, but a batch has the samples that the rank was given, and not the length of some tensor.

        A mean that is logged after the batches of an epoch is of all samples that the rank had.
        """
        averaged = value.is_tensor and meta.on_epoch and meta.is_mean_reduction
        if averaged and self.batch is not None and self.batch_size is None:
            self.batch_size = self._samples or None
        after_batches = batch_size is None and meta.fx.endswith("_epoch_end") and self._batches > 0
        if averaged and after_batches and self._exchange.is_needed:
            return self._samples_seen
        return super()._extract_batch_size(value, batch_size, meta)

    def exchange_epoch(self) -> None:
        """Epoch values become those over all ranks, for each key that any rank has logged since the last exchange."""
        metrics = []
        for key, rows in self._exchange_rows(lambda key: key.meta.on_epoch, self._epoch_row):  # (W, 4)
            if not rows[:, 0].any():
                continue
            metric = self._registered(key)
            metric.has_reset = False
            if key.is_tensor:
                present = rows[rows[:, 1] > 0]  # (n, 4), of the ranks that have logged it
                metric._computed = self._tensor(metric, key, present)  # type: ignore[assignment] # torchmetrics says only what it is at first
            else:
                metrics.append((metric, bool(rows[:, 2].any())))
        for metric, updated in metrics:
            with self._exchange.timer.waiting():
                self._compute(metric, updated=updated)
        if metrics:
            self._agree([metric for metric, _ in metrics])

    def _agree(self, metrics: Sequence[_ResultMetric]) -> None:
        """Make computed metrics the same on all ranks, also those that the user has told not to synchronize.

        Where ranks have other values, each weighs by its samples.
        """
        values: list[Any] = [metric._computed for metric in metrics]
        numbers = [value if isinstance(value, Tensor) and value.numel() == 1 else 0.0 for value in values]
        own = on_host([value.reshape(()) if isinstance(value, Tensor) else value for value in numbers])
        with self._exchange.timer.waiting():
            table = self._exchange.group.start(
                [float(self._samples_seen), *own], LOGGED_VALUES
            ).wait()  # (W, 1 + metrics)
        weights, rest = table[:, 0], table[:, 1:]  # (W,), (W, metrics)
        if not weights.any():
            weights = np.ones_like(weights)
        for metric, value, column in zip(metrics, values, rest.T, strict=True):
            if not np.array_equal(column, np.full_like(column, column[0]), equal_nan=True):
                mean = np.average(column[weights > 0], weights=weights[weights > 0])
                metric._computed = torch.full_like(value, mean)  # type: ignore[assignment] # as above

    @override
    def _get_cache(self, result_metric: _ResultMetric, on_step: bool) -> Tensor | None:  # type: ignore[override] # it is only called on the instance
        """As Lightning's, which computes, and so communicates, where nothing is cached; this one has no value then."""
        epoch = not on_step and result_metric.meta.on_epoch and not result_metric.meta.sync.rank_zero_only
        if self._exchange.is_needed and epoch and result_metric._computed is None:
            return None
        return _ResultCollection._get_cache(result_metric, on_step)

    def _exchange_rows(
        self, is_wanted: Callable[[LoggedKey], bool], row_of: Callable[[LoggedKey], list[Tensor | float]]
    ) -> list[tuple[LoggedKey, Numbers]]:
        """Rows of all ranks, (W, 4), for each wanted key that any rank has.

        Keys that some rank has logged for the first time cost a second exchange, once.
        """
        known = [key for key in self._keys.values() if is_wanted(key)]
        new = [
            LoggedKey.of(name, metric)
            for name, metric in self.items()
            if name not in self._keys and not metric.meta.sync.rank_zero_only
        ]
        own = np.array(on_host([number for key in [*known, *new] for number in row_of(key)])).reshape(-1, COLUMNS)
        group = self._exchange.group
        with self._exchange.timer.waiting():
            table = group.start([len(new), *own[: len(known)].ravel()], LOGGED_VALUES).wait()  # (W, 1 + 4 * known)
            reported: list[list[tuple[LoggedKey, Numbers]]] = (
                group.gather(list(zip(new, own[len(known) :], strict=True)), LOGGED_VALUES) if table[:, 0].any() else []
            )
        found = list(zip(known, table[:, 1:].reshape(len(table), -1, COLUMNS).swapaxes(0, 1), strict=True))  # (W, 4)
        for key in union([[key for key, _ in pairs] for pairs in reported]):
            self._keys[key.key] = key
            if is_wanted(key):
                by_rank = [{other.key: row for other, row in pairs} for pairs in reported]
                found.append((key, np.array([of_rank.get(key.key, np.zeros(COLUMNS)) for of_rank in by_rank])))
        return found

    def _epoch_row(self, key: LoggedKey) -> list[Tensor | float]:
        """A row of: not exchanged yet; bytes of its type, 0 if not logged; sum (metrics: whether updated); weight."""
        metric = self.get(key.key)
        if metric is None or metric.has_reset or not key.meta.on_epoch:
            return [0.0] * COLUMNS
        stale = float(metric._computed is None)
        if not key.is_tensor:
            return [stale, 1.0, float(metric.value.update_called), 0.0]
        weight = metric.cumulated_batch_size if metric.meta.is_mean_reduction else 1.0
        return [stale, float(metric.value.element_size()), metric.value, weight]

    def _registered(self, key: LoggedKey) -> _ResultMetric:
        """The metric under a key; registered now, as if logged here, where only other ranks have logged it."""
        if key.key not in self:
            metric = key.make_metric(self._exchange.reduce)
            if key.is_tensor:
                metric.to(self._exchange.device)
            else:
                metric.value = self._find(key.meta)
            self[key.key] = metric
        found: _ResultMetric = self[key.key]
        return found

    def _find(self, meta: _Metadata) -> Metric:
        found = None
        with suppress(AttributeError):
            found = self._exchange.module.get_submodule(meta.metric_attribute) if meta.metric_attribute else None
        if not isinstance(found, Metric):
            raise TypeError(
                f"rank {self._exchange.group.rank} ({self._exchange.device}) has to compute the metric {meta.name!r}, "
                f"which other ranks have logged, but its module has no metric under {meta.metric_attribute!r}: make "
                "the same metrics on all ranks"
            )
        return found

    @staticmethod
    def _tensor(metric: _ResultMetric, key: LoggedKey, rows: Numbers) -> Tensor:
        """The value over the ranks with these rows, (n, 4), in the highest precision among them."""
        dtype = torch.float64 if len(rows) and rows[:, 1].max() == torch.float64.itemsize else torch.float32
        value = combined(key.reduction, rows[:, 2], rows[:, 3])
        return torch.tensor(value, dtype=dtype, device=metric.value.device)

    @staticmethod
    def _compute(metric: _ResultMetric, *, updated: bool) -> None:
        """Compute a torchmetrics object, which gathers its states, on all ranks; `updated`: it was on any of them."""
        for part in metric.value.modules():
            if isinstance(part, Metric):
                part._computed = None  # a value that is kept on some ranks only would leave the others waiting
        with warnings.catch_warnings():
            if updated:  # no reason to warn on a rank where it was not
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            metric._computed = metric.value.compute()


@final
class EvaluationResults(SynchronizedResults):
    """The collection of a loop that validates or tests; a NaN is left out of a mean where the batch's count is 0."""

    def __init__(self, exchange: MetricExchange, metrics: MetricSync, count: Callable[[Any], float | Tensor]) -> None:
        super().__init__(exchange, training=False)
        self._metrics = metrics
        self._count = count  # from a batch to its loss count
        self._counted: tuple[Any, float | Tensor] = (None, 1.0)
        self._before_borrowed: ModuleSnapshot | None = None  # while this rank computes borrowed samples

    def begin_batch(self, samples: int | None) -> None:
        """A batch begins, before its hooks; see `EvaluationBalancer.begin_batch`."""
        self.count_batch(self.batch, samples)
        self._before_borrowed = ModuleSnapshot(self._exchange.module) if samples == 0 else None
        self._metrics.begin_batch(self._before_borrowed)

    def end_batch(self) -> None:
        """A batch and its hooks are over."""
        if self._before_borrowed is not None:
            self._before_borrowed.undo()
            self._before_borrowed = None
        self._metrics.end_batch()

    @override
    def update_metrics(self, key: str, value: Metric | Tensor, batch_size: int) -> None:
        metric = self[key]
        without_exchange(metric)
        metric.has_reset = False
        if self._before_borrowed is not None:  # the key is registered, and its value stays as it was
            if isinstance(value, Metric):
                metric.value = value
            metric._update_count += 1
            return
        weight: Any = batch_size
        if isinstance(value, Tensor) and metric.meta.is_mean_reduction and self.batch is not None:
            if value.device.type == "cpu":
                if not bool(torch.isfinite(value)) and not self._loss_count():
                    metric._update_count += 1
                    return
            elif isinstance(count := self._loss_count(), Tensor):
                kept = (count.to(value.device) > 0) | torch.isfinite(value)
                value, weight = torch.where(kept, value, torch.zeros_like(value)), kept * batch_size
        metric.forward(value, weight)

    def _loss_count(self) -> float | Tensor:
        if self._counted[0] is not self.batch:
            try:
                self._counted = self.batch, self._count(self.batch)
            except Exception:  # noqa: BLE001 - a user's rule for training batches need not know those of evaluation
                self._counted = self.batch, 1.0
        return self._counted[1]


def without_exchange(metric: _ResultMetric) -> None:
    """Updates of a value no longer communicate, even with `sync_dist`: other ranks may not log it at that moment."""
    metric.meta.sync._fn = _Sync.no_op
