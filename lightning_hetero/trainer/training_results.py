"""What training steps log, also where a rank has no valid samples, borrows them, or computes a batch in parts."""
# ruff: noqa: SLF001 - it overrides the private parts of Lightning's collection; a test guards them

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_hetero.device.step_timer import device_clock
from lightning_hetero.trainer.logged_values import COLUMNS, LoggedKey, Numbers, is_zero
from lightning_hetero.trainer.results import MetricExchange, SynchronizedResults, without_exchange
from lightning_hetero.trainer.step_values import StepValues
from lightning_hetero.trainer.torchmetrics import MetricSync


class _PartValue(NamedTuple):
    """What one part of a batch has logged under a key."""

    value: Tensor
    batch_size: int
    weight: float


class PartLogs:
    """Collects what the parts of a batch log, to log it once for the whole batch; each becomes `results.batch`."""

    def __init__(self, results: "TrainingResults") -> None:
        self._results = results
        self._part: list[tuple[str, Tensor, int]] = []  # key, value and batch size
        self._kept: dict[str, list[_PartValue]] = {}

    def begin(self, batch: Any, samples: int) -> None:
        """A part begins, of so many samples; what an earlier part logged without `keep` is dropped."""
        self._part.clear()
        self._results.set_batch(batch, samples)

    def add(self, key: str, value: Tensor, batch_size: int) -> None:
        """The part logs a value."""
        self._part.append((key, value.detach(), batch_size))

    def keep(self, loss: Tensor, count: float) -> None:
        """The part is done.

        Args:
            loss: that the part returned.
            count: its loss count: the weight of the loss where that was logged; with 0, NaN is left out.
        """
        for key, value, batch_size in self._part:
            is_loss = value.shape == loss.shape and bool(_equal(value, loss).all())
            left_out = count == 0 and not bool(torch.isfinite(value).all())
            weight = 0.0 if left_out else count if is_loss else float(batch_size)
            self._kept.setdefault(key, []).append(_PartValue(value, batch_size, weight))
        self._part.clear()

    def combined(self) -> Iterator[tuple[str, Tensor, int]]:
        """Key, value and batch size of the whole batch, in the order in which keys were first logged."""
        for key, parts in self._kept.items():
            meta = self._results[key].meta
            size = sum(part.batch_size for part in parts)
            if not meta.on_epoch and all(part.batch_size == 1 for part in parts):
                size = 1  # as Lightning gives for values that it does not average
            values = torch.stack([part.value for part in parts])  # (parts,)
            if meta.is_max_reduction:
                value = values.amax(0)
            elif meta.is_min_reduction:
                value = values.amin(0)
            elif meta.is_mean_reduction:
                counted = [part for part in parts if part.weight > 0] or parts
                total = sum(part.weight for part in counted)
                terms = [p.value * (p.weight / total if total > 0 else 1 / len(counted)) for p in counted]
                value = torch.stack(terms).sum(0)
            else:
                value = values.sum(0)
            yield key, value, size


@dataclass
class _StepLog:
    """What was logged while a batch was computed, until the weight of its loss is known."""

    key: str
    value: Tensor
    batch_size: int
    is_loss: bool | Tensor = False  # the same as the loss that the step returned


def _equal(value: Tensor, loss: Tensor) -> Tensor:
    """Where a logged value is the loss, in the coarser of their types: Lightning stores a number as a float32."""
    types = [tensor.dtype for tensor in (value, loss) if tensor.is_floating_point()]
    coarser = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    return value.to(coarser) == loss.to(coarser)


@final
class TrainingResults(SynchronizedResults):
    """The training loop's collection; step values become those over all ranks too.

    A borrowed step registers its keys but adds nothing. A step without valid samples adds everything but its loss and
    values that are not finite. The loss that the step returned has the weight that it has in the loss of the global
    batch; everything else is weighted by Lightning's batch size.

    In steps after which ranks exchange, step values are those of the step. In others they are those of an earlier one,
    of the step before where all ranks run on CPUs: see `StepValues`. A torchmetrics object's is then the mean of the
    ranks' values, each weighted by the rank's samples.

    Args:
        exchange: between the ranks.
        metric_sync: gathers the states of torchmetrics; None with one rank.
    """

    def __init__(self, exchange: MetricExchange, metric_sync: MetricSync | None) -> None:
        super().__init__(exchange, training=True)
        self._metric_sync = metric_sync
        self._step = self._sent_step = self._exchanged_step = 0
        self._values = StepValues(device_clock(exchange.device), exchange.group.world_size)
        self._is_due = False
        self._borrowed = self._empty = self._in_step = False
        self._count: Tensor | None = None
        self._pending: list[_StepLog] = []
        self._earlier = 0  # how many of them an earlier closure of the same step has logged
        self._updated: set[str] = set()  # keys of this step
        self._parts: PartLogs | None = None

    def set_batch(self, batch: Any, samples: int | None) -> None:
        """Values that are logged from now on are means over the samples of this batch, if their number is known."""
        self.batch, self.batch_size = batch, samples

    @contextmanager
    def in_parts(self) -> Iterator[PartLogs]:
        """The batch is computed once more, in parts: each key is updated once, at the end, if it was not before."""
        batch, size = self.batch, self.batch_size
        self._parts = parts = PartLogs(self)
        try:
            yield parts
        finally:
            self._parts = None
            self.set_batch(batch, size)
        done = set(self._updated)
        for key, value, size in parts.combined():
            if key not in done:
                self.update_metrics(key, value, size)

    def begin_step(self, *, borrowed: bool, empty: bool, count: Tensor | None) -> None:
        """A training step begins, on all ranks; with some optimizers, once more for the same batch.

        Args:
            borrowed: this rank computes other ranks' samples.
            empty: the loss count of this rank is known to be 0.
            count: the loss count, if it is only known on the device; NaN is left out where it is 0.
        """
        self._step += 1
        self._in_step, self._borrowed, self._empty = True, borrowed, empty
        self._count = count
        self._updated.clear()
        self._earlier = len(self._pending)

    def end_step(self, loss: Tensor | None) -> None:
        """The training step has returned its loss; find the logged values that are this loss."""
        if loss is None or loss.numel() != 1:
            return
        loss = loss.detach().reshape(())
        for logged in self._pending[self._earlier :]:
            if logged.value.device == loss.device:
                equal = _equal(logged.value, loss)
                # Where the loss count stays on the device, this does too, so that the host does not wait.
                logged.is_loss = equal if self._count is not None else bool(equal)

    def end_batch(self, loss_weight: float | Tensor | None) -> None:
        """The batch ends: add what it has logged, before hooks read it.

        Args:
            loss_weight: of the loss that the step returned, in samples; None: the number of the rank's samples.
        """
        self._in_step = False
        pending, self._pending = self._pending, []
        for logged in pending:
            weight: float | Tensor = logged.batch_size
            if loss_weight is not None and logged.is_loss is not False and self._is_lightnings_size(logged):
                weight = loss_weight
                if isinstance(is_loss := logged.is_loss, Tensor):
                    on_device = torch.as_tensor(loss_weight, device=is_loss.device)
                    weight = torch.where(is_loss, on_device, logged.batch_size)
            self._add(logged.key, logged.value, weight)

    def _is_lightnings_size(self, logged: _StepLog) -> bool:
        """Whether a batch size is Lightning's own number of samples, and not one that the user gave."""
        uncounted = logged.batch_size == 1 and not self[logged.key].meta.on_epoch
        return uncounted or self._samples is None or logged.batch_size == self._samples

    @override
    def update_metrics(self, key: str, value: Metric | Tensor, batch_size: int) -> None:
        metric = self[key]
        metric.has_reset = False
        if metric.meta.fx.endswith("_epoch_end"):  # no longer a value of the last batch
            self._borrowed = self._empty = False
            self._count = None
        if self._parts is not None and isinstance(value, Tensor) and metric.is_tensor:
            self._parts.add(key, value, batch_size)
            return
        self._updated.add(key)
        if isinstance(value, Metric) or not metric.is_tensor:
            if self._borrowed:
                metric.value = value  # registers the key; its value stays as it was
            else:
                self._add_metric(key, value, batch_size)
        elif self._in_step:
            self._pending.append(_StepLog(key, value.detach(), batch_size))
        else:
            self._add(key, value, batch_size)

    def _add_metric(self, key: str, value: Any, batch_size: int) -> None:
        metric = self[key]
        before = metric._forward_cache
        metric.forward(value, batch_size)
        if metric.meta.on_step and self._is_synchronized(metric.meta):
            own = metric._forward_cache
            metric._forward_cache = before
            if isinstance(own, Tensor) and own.numel() == 1:
                self._values.add(key, own.detach().reshape(()), float(self._samples or 1), self._step)

    def _is_synchronized(self, meta: _Metadata) -> bool:
        """Whether loggers and callbacks see the value over all ranks only."""
        return self._exchange.is_needed and not meta.sync.rank_zero_only

    def _add(self, key: str, value: Tensor, weight: float | Tensor) -> None:
        metric = self[key]
        meta = metric.meta
        if not meta.on_epoch and self._samples and not isinstance(weight, Tensor) and weight == 1:
            weight = self._samples  # Lightning gives 1 for a value that it never averages
        if self._borrowed or (self._empty and not bool(torch.isfinite(value))):
            value, weight = torch.zeros_like(value), 0.0
        elif meta.is_mean_reduction and self._count is not None:
            kept = (self._count > 0) | torch.isfinite(value)
            value, weight = torch.where(kept, value, torch.zeros_like(value)), kept * weight
        without_exchange(metric)
        synchronized = self._is_synchronized(meta)
        if is_zero(weight):
            metric._update_count += 1  # what torchmetrics' wrapped update does, so that `compute` is allowed
        else:
            if meta.is_mean_reduction and not isinstance(weight, int):
                # An integer and a fraction would be added up in single precision.
                metric.cumulated_batch_size = metric.cumulated_batch_size.double()
            before = metric._forward_cache
            metric.forward(value, weight)  # it only multiplies and adds
            value = metric._forward_cache
            if synchronized:
                metric._forward_cache = before
        if synchronized and meta.on_step:
            self._values.add(key, value, weight, self._step)

    # ---- between ranks ----

    def message(self) -> list[float]:
        """What is sent along with this rank's next message: whether it has logged new keys, and earlier values."""
        keys = self._step_keys()
        if self._step > self._sent_step:
            self._values.end_step(self._step, [self._step_row(key) for key in keys])
            self._sent_step = self._step
        return [float(self.has_new_keys), *self._values.message(len(keys))]

    def receive(self, table: Numbers) -> None:
        """What all ranks have sent with their messages, (W, columns)."""
        if table.shape[1] == 0:  # with one rank
            return
        self._is_due |= bool(table[:, 0].any())
        complete = self._values.receive(table[:, 1:])
        if complete is not None and complete[0] > self._exchanged_step:
            for key, rows in zip(self._step_keys(), complete[1], strict=False):  # (W, 4)
                self._set_step_value(key, rows)

    @property
    def has_new_keys(self) -> bool:
        """Whether this rank has logged step values under keys that not all ranks know."""
        return any(
            name not in self._keys and metric.meta.on_step and not metric.meta.sync.rank_zero_only
            for name, metric in self.items()
        )

    @property
    def needs_exchange(self) -> bool:
        """Whether values have to be exchanged after this step, since a rank has logged new keys."""
        return self._is_due or self._exchanged_step == 0

    def exchange_steps(self) -> None:
        """Step values become those over all ranks."""
        self._exchanged_step, self._is_due = self._step, False
        metrics = []
        for key, rows in self._exchange_rows(lambda key: key.meta.on_step, self._step_row):  # (W, 4)
            self._set_step_value(key, rows)
            if not key.is_tensor and rows[:, 1].any():
                metrics.append(self._registered(key))
        if metrics and self._metric_sync is not None:
            values = self._metric_sync.batch_values([metric.value for metric in metrics])
            for metric, value in zip(metrics, values, strict=True):
                if isinstance(value, Tensor) and value.numel() == 1:
                    metric._forward_cache = value.reshape(())

    def _set_step_value(self, key: LoggedKey, rows: Numbers) -> None:
        """Set the step value of a key from the rows of all ranks, (W, 4)."""
        if not rows[:, 1].any():
            return
        # A key that is not logged in every step keeps its last value, which only ranks that logged it last have.
        latest = rows[rows[:, 0] == rows[:, 0].max()]
        latest = latest[latest[:, 3] > 0]  # (n, 4)
        metric = self._registered(key)
        metric.has_reset = False
        metric._forward_cache = self._tensor(metric, key, latest) if len(latest) else None

    def _step_keys(self) -> list[LoggedKey]:
        """The keys with step values that all ranks know, in the same order."""
        return [key for key in self._keys.values() if key.meta.on_step]

    def _step_row(self, key: LoggedKey) -> list[Tensor | float]:
        """See `StepValue.row`."""
        known = key.key in self and not self[key.key].has_reset
        return self._values.row(key) if known else [0.0] * COLUMNS
