"""What training steps log: also where a rank has nothing, or nothing valid, to log, or computes a batch in parts."""
# ruff: noqa: SLF001 - stands in for what Lightning's collection does inside; a test guards it

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _METRICS
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_hetero.trainer.logged_values import LoggedKey, is_zero
from lightning_hetero.trainer.results import COLUMNS, MetricExchange, SynchronizedResults, without_exchange


class _PartValue(NamedTuple):
    """What one part of a batch has logged under a key."""

    value: Tensor
    batch_size: int
    weight: float


class PartLogs:
    """What the parts of a batch log, to be logged once for all of it; each part is the batch of `results` meanwhile."""

    def __init__(self, results: "TrainingResults") -> None:
        self._results = results
        self._part: list[tuple[str, Tensor, int]] = []  # key, value and batch size
        self._kept: dict[str, list[_PartValue]] = {}

    def begin(self, batch: Any) -> None:
        """A part begins; what one that was not kept has logged is forgotten."""
        self._part.clear()
        self._results.set_batch(batch)

    def add(self, key: str, value: Tensor, batch_size: int) -> None:
        """The part logs a value."""
        self._part.append((key, value.detach(), batch_size))

    def keep(self, loss: Tensor, count: float) -> None:
        """The part is done.

        Args:
            loss: that it returned.
            count: what it counts for; the weight of the loss, where that was logged, and 0 leaves NaN out.
        """
        for key, value, batch_size in self._part:
            is_loss = value.shape == loss.shape and torch.equal(value.to(loss.dtype), loss)
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
                size = 1  # which Lightning says of values that it does not average
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


@dataclass(frozen=True)
class _StepValue:
    """What this rank has logged in a step."""

    value: Tensor
    weight: float | Tensor  # in the mean over ranks; 0 leaves the value out of any reduction; may be on the device
    step: int  # in which it was logged, from 1, counted alike on all ranks


@final
class TrainingResults(SynchronizedResults):
    """The training loop's collection; its values on step level become those over all ranks too.

    A borrowed step registers its keys but adds nothing. A step in which nothing counts adds everything but its loss and
    what is not finite. The loss that the step returned weighs what it weighs in the loss of the global batch,
    everything else as many samples as Lightning says.
    """

    def __init__(self, exchange: MetricExchange) -> None:
        super().__init__(exchange, training=True)
        self._step = self._exchanged_step = 0
        self._step_values: dict[str, _StepValue] = {}
        self._borrowed = self._empty = self._open = False
        self._samples: float | Tensor | None = None
        self._count: Tensor | None = None
        self._waiting: list[_StepLog] = []
        self._updated: set[str] = set()  # keys of this step
        self._parts: PartLogs | None = None

    def set_batch(self, batch: Any) -> None:
        """Values that are logged from now on are means over the samples of this batch."""
        self.batch, self.batch_size = batch, None

    @contextmanager
    def in_parts(self) -> Iterator[PartLogs]:
        """The batch is computed once more, in parts: each key is updated once, at the end, if it was not before."""
        batch = self.batch
        self._parts = parts = PartLogs(self)
        try:
            yield parts
        finally:
            self._parts = None
            self.set_batch(batch)
        done = set(self._updated)
        for key, value, size in parts.combined():
            if key not in done:
                self.update_metrics(key, value, size)

    def begin_step(self, *, borrowed: bool, empty: bool, samples: int | None, count: Tensor | None) -> None:
        """A training step begins, on all ranks.

        Args:
            borrowed: it is on other ranks' samples.
            empty: nothing of the rank's own samples counts.
            samples: of this rank; None where the user shards.
            count: what the samples count for, where only the device knows; then NaN is left out where it is 0.
        """
        self._step += 1
        self._open, self._borrowed, self._empty = True, borrowed, empty
        self._samples, self._count = samples, count
        self._updated.clear()

    def end_step(self, loss: Tensor | None) -> None:
        """The training step has returned its loss; see what was logged of it."""
        if loss is None or loss.numel() != 1:
            return
        loss = loss.detach().reshape(())
        for logged in self._waiting:
            if logged.value.device == loss.device:
                equal = logged.value.to(loss.dtype) == loss
                # Where the host may not know what counts, it need not know this either.
                logged.is_loss = equal if self._count is not None else bool(equal)

    def batch_over(self, loss_weight: float | Tensor | None) -> None:
        """The batch is over: add what it has logged, before hooks look at it.

        Args:
            loss_weight: of the loss that the step returned, in samples; None: as many as the rank has.
        """
        self._open = False
        waiting, self._waiting = self._waiting, []
        for logged in waiting:
            weight: float | Tensor = logged.batch_size
            if loss_weight is not None and logged.is_loss is not False and self._is_lightnings_size(logged):
                weight = loss_weight
                if isinstance(is_loss := logged.is_loss, Tensor):
                    on_device = torch.as_tensor(loss_weight, device=is_loss.device)
                    weight = torch.where(is_loss, on_device, logged.batch_size)
            self._add(logged.key, logged.value, weight)

    def _is_lightnings_size(self, logged: _StepLog) -> bool:
        """Whether a batch size is what Lightning takes for the number of samples; another one is the user's."""
        uncounted = logged.batch_size == 1 and not self[logged.key].meta.on_epoch
        return uncounted or self._samples is None or logged.batch_size == self._samples

    @override
    def update_metrics(self, key: str, value: Metric | Tensor, batch_size: int) -> None:
        metric = self[key]
        metric.has_reset = False
        if self._parts is not None and isinstance(value, Tensor) and metric.is_tensor:
            self._parts.add(key, value, batch_size)
            return
        self._updated.add(key)
        if isinstance(value, Metric) or not metric.is_tensor:
            if self._borrowed:
                metric.value = value  # the key is known; the step's value stays what it was
            else:
                metric.forward(value, batch_size)
        elif self._open:
            self._waiting.append(_StepLog(key, value.detach(), batch_size))
        else:
            self._add(key, value, batch_size)

    def _add(self, key: str, value: Tensor, weight: float | Tensor) -> None:
        metric = self[key]
        meta = metric.meta
        if not meta.on_epoch and self._samples and not isinstance(weight, Tensor) and weight == 1:
            weight = self._samples  # Lightning does not count them for a value that it never averages
        if self._borrowed or (self._empty and not bool(torch.isfinite(value))):
            value, weight = torch.zeros_like(value), 0.0
        elif meta.is_mean_reduction and self._count is not None:
            kept = (self._count > 0) | torch.isfinite(value)
            value, weight = torch.where(kept, value, torch.zeros_like(value)), kept * weight
        without_exchange(metric)
        synchronized = self._exchange.is_needed and not meta.sync.rank_zero_only
        if is_zero(weight):
            metric._update_count += 1  # what torchmetrics' wrapped update does, so that `compute` is allowed
        else:
            if meta.is_mean_reduction and not isinstance(weight, int):
                # A whole number and a fraction would be added up in single precision.
                metric.cumulated_batch_size = metric.cumulated_batch_size.double()
            before = metric._forward_cache
            metric.forward(value, weight)  # it only multiplies and adds
            value = metric._forward_cache
            if synchronized:
                # What loggers and callbacks see is the value over all ranks, which the next exchange brings.
                metric._forward_cache = before
        if synchronized and meta.on_step:
            self._step_values[key] = _StepValue(value, weight, self._step)

    def exchange_steps(self) -> None:
        """Values on step level become those over all ranks, until the next exchange."""
        self._exchanged_step = self._step
        for key, rows in self._exchange_rows(lambda key: key.meta.on_step and key.is_tensor, self._step_row):  # (W, 4)
            if not rows[:, 1].any():
                continue
            # A key that is logged now and then keeps its last value, and only those who logged it last have that one.
            latest = rows[rows[:, 0] == rows[:, 0].max()]
            latest = latest[latest[:, 3] > 0]  # (n, 4)
            metric = self._registered(key)
            metric.has_reset = False
            metric._forward_cache = self._tensor(metric, key, latest) if len(latest) else None

    @override
    def metrics(self, on_step: bool) -> _METRICS:
        """As Lightning's; between exchanges the progress bar, which only rank 0 has, shows what this rank has."""
        metrics = super().metrics(on_step)
        if on_step and self._exchange.group.rank == 0:
            for key, own in self._step_values.items():
                metric = self[key]
                is_newer = own.step > self._exchanged_step and not metric.has_reset and not is_zero(own.weight)
                if is_newer and metric.meta.prog_bar:
                    metrics["pbar"][self._forked_name(metric, on_step)[1]] = own.value.item()
        return metrics

    def _step_row(self, key: LoggedKey) -> list[Tensor | float]:
        """The step in which it was logged last, from 1; bytes of a number, 0 for none; sum; weight."""
        own = self._step_values.get(key.key)
        if own is None or self[key.key].has_reset:
            return [0.0] * COLUMNS
        value: Tensor | float = own.value
        if key.reduction == "mean":
            value = own.value.double() * own.weight if not is_zero(own.weight) else 0.0
        return [float(own.step), float(own.value.element_size()), value, own.weight]
