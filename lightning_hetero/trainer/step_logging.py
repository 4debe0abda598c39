"""What a rank logs in a training step, where it has nothing, or nothing valid, to log, or computes in parts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_hetero.trainer.results import MetricExchange, TrainingResults


class _PartValue(NamedTuple):
    """What one part of a batch has logged under a key."""

    value: Tensor
    batch_size: int
    weight: float


class PartLogs:
    """What the parts of a batch log, to be logged once for all of it; each part is the batch of `results` meanwhile."""

    def __init__(self, results: TrainingResults) -> None:
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


class StepLogging:
    """Stands between `self.log` and the training loop's collection.

    A borrowed step registers its keys but adds nothing. A step in which nothing counts adds everything but its loss and
    what is not finite. The loss that the step returned weighs what it weighs in the loss of the global batch,
    everything else as many samples as Lightning says.
    """

    def __init__(self, exchange: MetricExchange) -> None:
        self.results = TrainingResults(exchange, self._update)
        """In place of Lightning's collection."""
        self._borrowed = self._empty = self._open = False
        self._samples: float | Tensor | None = None
        self._count: Tensor | None = None
        self._waiting: list[_StepLog] = []
        self._updated: set[str] = set()  # keys of this step
        self._parts: PartLogs | None = None

    @contextmanager
    def in_parts(self) -> Iterator[PartLogs]:
        """The batch is computed once more, in parts: each key is updated once, at the end, if it was not before."""
        batch = self.results.batch
        self._parts = parts = PartLogs(self.results)
        try:
            yield parts
        finally:
            self._parts = None
            self.results.set_batch(batch)
        done = set(self._updated)
        for key, value, size in parts.combined():
            if key not in done:
                self._update(key, value, size)

    def begin(self, *, borrowed: bool, empty: bool, samples: int | None, count: Tensor | None) -> None:
        """A training step begins.

        Args:
            borrowed: it is on other ranks' samples.
            empty: nothing of the rank's own samples counts.
            samples: of this rank; None where the user shards.
            count: what the samples count for, where only the device knows; then NaN is left out where it is 0.
        """
        self.results.next_step()
        self._open, self._borrowed, self._empty = True, borrowed, empty
        self._samples, self._count = samples, count
        self._updated.clear()

    def end(self, loss: Tensor | None) -> None:
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
        uncounted = logged.batch_size == 1 and not self.results[logged.key].meta.on_epoch
        return uncounted or self._samples is None or logged.batch_size == self._samples

    def _update(self, key: str, value: Any, batch_size: int) -> None:
        """A value is logged; see `_ResultCollection.update_metrics`."""
        metric = self.results[key]
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
        meta = self.results[key].meta
        if not meta.on_epoch and self._samples and not isinstance(weight, Tensor) and weight == 1:
            weight = self._samples  # Lightning does not count them for a value that it never averages
        if self._borrowed or (self._empty and not bool(torch.isfinite(value))):
            value, weight = torch.zeros_like(value), 0.0
        elif meta.is_mean_reduction and self._count is not None:
            kept = (self._count > 0) | torch.isfinite(value)
            value, weight = torch.where(kept, value, torch.zeros_like(value)), kept * weight
        self.results.add(key, value, weight)
