"""What a rank logs in a step in which it has nothing, or nothing valid, to log."""
# ruff: noqa: SLF001 - what stands in for an update of Lightning's metric has to leave it as the update would

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor
from torchmetrics import Metric

from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer, without_exchange
from lightning_hetero.trainer.patches import Patch


@dataclass
class _Entry:
    """What one part of a batch has logged under a key."""

    value: Tensor
    batch_size: int
    weight: float = math.nan  # of the part, once it is done


class PartLogs:
    """What the parts of a batch log, to be logged once for all of it.

    Args:
        results: whose batch size is the part's meanwhile.
    """

    def __init__(self, results: _ResultCollection) -> None:
        self._results = results
        self._part: list[tuple[str, _Entry]] = []
        self._kept: dict[str, list[_Entry]] = {}

    def begin(self, batch: Any) -> None:
        """A part begins; what one that was not kept has logged is forgotten."""
        self._part.clear()
        self._results.batch, self._results.batch_size = batch, None

    def add(self, key: str, value: Tensor, batch_size: int) -> None:
        """The part logs a value."""
        self._part.append((key, _Entry(value.detach(), batch_size)))

    def keep(self, loss: Tensor, count: float) -> None:
        """The part is done.

        Args:
            loss: that it returned.
            count: what it counts for; the weight of the loss, where that was logged, and 0 leaves NaN out.
        """
        for key, entry in self._part:
            same = entry.value.shape == loss.shape and torch.equal(entry.value.to(loss.dtype), loss)
            nothing = count == 0 and not bool(torch.isfinite(entry.value).all())
            entry.weight = 0.0 if nothing else count if same else float(entry.batch_size)
            self._kept.setdefault(key, []).append(entry)
        self._part.clear()

    def combined(self) -> Iterator[tuple[str, Tensor, int]]:
        """Key, value and batch size of the whole batch, in the order in which keys were first logged."""
        for key, entries in self._kept.items():
            meta = self._results[key].meta
            size = sum(entry.batch_size for entry in entries)
            if not meta.on_epoch and all(entry.batch_size == 1 for entry in entries):
                size = 1  # which Lightning says of values that it does not average
            values = torch.stack([entry.value for entry in entries])
            if meta.is_max_reduction or meta.is_min_reduction:
                value = values.amax(0) if meta.is_max_reduction else values.amin(0)
            elif meta.is_mean_reduction:
                counted = [entry for entry in entries if entry.weight > 0] or entries
                total = sum(entry.weight for entry in counted)
                parts = [e.value * (e.weight / total if total > 0 else 1 / len(counted)) for e in counted]
                value = torch.stack(parts).sum(0)
            else:
                value = values.sum(0)
            yield key, value, size


@dataclass
class _Held:
    """What was logged while a batch was computed, until the weight of its loss is known."""

    key: str
    value: Tensor
    batch_size: int
    same: bool | Tensor = False  # as the loss that the step returned


class StepLogging:
    """Stands between `self.log` and Lightning's result collection while training.

    A borrowed step registers its keys but adds nothing. A step in which nothing counts adds everything but the loss.
    The loss that the step returned weighs what it weighs in the loss of the global batch, everything else as many
    samples as Lightning says.

    Args:
        results: the training loop's collection.
        truth: where ranks agree on them; None where there is only one.
    """

    def __init__(self, results: _ResultCollection, truth: MetricSynchronizer | None) -> None:
        self._results = results
        self._truth = truth
        self._shared = truth.training if truth is not None else None
        self._borrowed = self._empty = self._open = False
        self._samples: float | Tensor | None = None
        self._count: Tensor | None = None
        self._held: list[_Held] = []
        self._updated: set[str] = set()  # keys of this step
        self._parts: PartLogs | None = None

    @contextmanager
    def in_parts(self) -> Iterator[PartLogs]:
        """The batch is computed once more, in parts: each key is updated once, at the end, if it was not before."""
        batch, batch_size = self._results.batch, self._results.batch_size
        self._parts = parts = PartLogs(self._results)
        try:
            yield parts
        finally:
            self._parts = None
            self._results.batch, self._results.batch_size = batch, batch_size
        done = set(self._updated)
        for key, value, size in parts.combined():
            if key not in done:
                self.update(key, value, size)

    def patches(self) -> list[Patch]:
        """What to set on the Trainer; see `TrainerPatches`."""
        more = self._truth.patches() if self._truth is not None else []
        return [(self._results, "update_metrics", self.update), *more]

    def begin(self, *, borrowed: bool, empty: bool, samples: int | None, count: Tensor | None) -> None:
        """A training step begins.

        Args:
            borrowed: it is on other ranks' samples.
            empty: nothing of the rank's own samples counts.
            samples: of this rank; None where the user shards.
            count: what the samples count for, where only the device knows; then NaN is left out where it is 0.
        """
        if self._shared is not None:
            self._shared.next_step()
        self._open = True
        self._count = count
        self._samples = samples
        self._updated.clear()
        self._borrowed, self._empty = borrowed, empty and not borrowed

    def end(self, loss: Tensor | None) -> None:
        """The training step has returned its loss; see what was logged of it."""
        if loss is None or loss.numel() != 1:
            return
        loss = loss.detach().reshape(())
        for held in self._held:
            if held.value.device != loss.device:
                continue
            equal = held.value.to(loss.dtype) == loss
            # Where the host may not know what counts, it need not know this either.
            held.same = equal if self._count is not None else bool(equal)

    def epoch_over(self) -> None:
        """This rank has no more batches in this epoch, nor have the others."""
        if self._truth is not None:
            self._truth.epoch_over()

    def batch_over(self, loss_weight: float | Tensor | None) -> None:
        """The batch is over: add what it has logged, before hooks look at it.

        Args:
            loss_weight: of the loss that the step returned, in samples; None: as many as the rank has.
        """
        self._open = False
        held, self._held = self._held, []
        for one in held:
            weight: float | Tensor = one.batch_size
            if loss_weight is not None and one.same is not False and self._is_plain(one):
                weight = loss_weight
                if isinstance(one.same, Tensor):
                    weight = torch.where(one.same, torch.as_tensor(loss_weight, device=one.same.device), one.batch_size)
            self._add(one.key, one.value, weight)
        if self._truth is not None:
            self._truth.batch_over()

    def _is_plain(self, held: _Held) -> bool:
        """Whether a batch size is what Lightning takes for the number of samples; another one is the user's."""
        uncounted = held.batch_size == 1 and not self._results[held.key].meta.on_epoch
        return uncounted or self._samples is None or held.batch_size == self._samples

    def update(self, key: str, value: Any, batch_size: int) -> None:
        """What the collection calls for every logged value; see `_ResultCollection.update_metrics`."""
        metric = self._results[key]
        if self._parts is not None and isinstance(value, Tensor) and metric.is_tensor:
            self._parts.add(key, value, batch_size)
            metric.has_reset = False
            return
        self._updated.add(key)
        metric.has_reset = False
        if isinstance(value, Metric) or not metric.is_tensor:
            if self._borrowed:
                metric.value = value  # the key is known; the step's value stays what it was
            else:
                metric.forward(value, batch_size)
        elif self._open:
            self._held.append(_Held(key, value.detach(), batch_size))
        else:
            self._add(key, value, batch_size)

    def _add(self, key: str, value: Tensor, weight: float | Tensor) -> None:
        metric = self._results[key]
        if not metric.meta.on_epoch and self._samples and not isinstance(weight, Tensor) and weight == 1:
            weight = self._samples  # Lightning does not count them for a value that it never averages
        if self._borrowed or (self._empty and not bool(torch.isfinite(value))):
            value, weight = torch.zeros_like(value), 0.0
        elif metric.meta.is_mean_reduction and self._count is not None:
            kept = (self._count > 0) | torch.isfinite(value)
            value, weight = torch.where(kept, value, torch.zeros_like(value)), kept * weight
        without_exchange(metric)
        if not isinstance(weight, Tensor) and weight == 0:
            metric._update_count += 1  # what torchmetrics' wrapped update does, so that `compute` is allowed
            shown = value
        else:
            if metric.meta.is_mean_reduction and not isinstance(weight, int):
                # A whole number and a fraction would be added up in single precision.
                metric.cumulated_batch_size = metric.cumulated_batch_size.double()
            before = metric._forward_cache
            metric.forward(value, weight)  # it only multiplies and adds
            shown = metric._forward_cache
            if self._shared is None or metric.meta.sync.rank_zero_only:
                return
            # What loggers and callbacks see is the value over all ranks, which the next exchange brings.
            metric._forward_cache = before
        if self._shared is not None and metric.meta.on_step:
            self._shared.note(key, shown, weight)
