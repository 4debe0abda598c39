"""What a rank logs in a step in which it has nothing, or nothing valid, to log."""
# ruff: noqa: SLF001 - what stands in for an update of Lightning's metric has to leave it as the update would

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor
from torchmetrics import Metric


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
            yield key, value, sum(entry.batch_size for entry in entries)


class StepLogging:
    """Stands between `self.log` and Lightning's result collection while training.

    A borrowed step registers its keys but adds nothing. A step in which nothing counts adds everything but the loss.
    A step value with `sync_dist` becomes the mean over ranks weighted by batch size; Lightning's is a plain one.

    Args:
        results: the training loop's collection.
        reduce: the strategy's, over all ranks.
    """

    def __init__(self, results: _ResultCollection, reduce: Callable[..., Any]) -> None:
        self._results = results
        self._reduce = reduce
        self._borrowed = self._empty = False
        self._count: Tensor | None = None
        self._logged: list[tuple[_ResultMetric, Tensor, int]] = []
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

    def begin(self, *, borrowed: bool, empty: bool, count: Tensor | None = None) -> None:
        """A training step begins.

        Args:
            borrowed: it is on other ranks' samples.
            empty: nothing of the rank's own samples counts.
            count: what the samples count for, where only the device knows; then NaN is left out where it is 0.
        """
        self._count = count
        self._updated.clear()
        self._borrowed, self._empty = borrowed, empty and not borrowed
        self._logged.clear()

    def end(self, loss: Tensor | None) -> None:
        """The training step has returned its loss; take back what was logged of it where nothing counts."""
        for metric, value, batch_size in self._logged if loss is not None else ():
            if value.shape == loss.shape and torch.equal(value.to(loss.dtype), loss.detach()):  # type: ignore[union-attr] # narrowed above
                metric.value = metric.value - value * batch_size
                metric.cumulated_batch_size = metric.cumulated_batch_size - batch_size
        self._borrowed = self._empty = False
        self._logged.clear()

    def update(self, key: str, value: Any, batch_size: int) -> None:
        """What the collection calls for every logged value; see `_ResultCollection.update_metrics`."""
        metric = self._results[key]
        if self._parts is not None and isinstance(value, Tensor) and metric.is_tensor:
            self._parts.add(key, value, batch_size)
            metric.has_reset = False
            return
        self._updated.add(key)
        if isinstance(value, Metric) or not metric.is_tensor:
            if self._borrowed:
                metric.value = value  # the key is known; the step's value stays what it was
            else:
                metric.forward(value, batch_size)
            metric.has_reset = False
            return
        left_out = self._borrowed or (self._empty and not bool(torch.isfinite(value).all()))
        mean = metric.meta.is_mean_reduction
        synced = metric.meta.on_step and metric.meta.sync.should and not metric.meta.sync.rank_zero_only
        if mean and self._count is not None and not left_out:
            self._masked_on_device(metric, value, batch_size, synced=synced)
        elif mean and synced:
            self._synced_step_value(metric, value, 0 if left_out else batch_size)
        elif left_out:
            self._keep_matched(metric, value, synced=synced)
        else:
            metric.forward(value, batch_size)
        if self._empty and mean and metric.meta.on_epoch and not left_out:
            self._logged.append((metric, value, batch_size))
        metric.has_reset = False

    def _masked_on_device(self, metric: _ResultMetric, value: Tensor, batch_size: int, *, synced: bool) -> None:
        """As below, for a rank that only the device knows to be empty; the host asks it nothing."""
        assert self._count is not None
        kept = (self._count > 0) | torch.isfinite(value)
        weight = kept * batch_size
        value = torch.where(kept, value.detach(), torch.zeros_like(value))
        if synced:
            self._synced_step_value(metric, value, weight)
            return
        before = metric._forward_cache
        metric.forward(value, weight)  # type: ignore[arg-type] # it only multiplies and adds
        if metric.meta.on_step and before is not None:
            metric._forward_cache = torch.where(kept, value, before)

    def _synced_step_value(self, metric: _ResultMetric, value: Tensor, weight: int | Tensor) -> None:
        """Lightning's update, with [sum of n*v, sum of n] in one exchange in place of a plain mean."""
        value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        none = not isinstance(weight, Tensor) and weight == 0
        own = torch.zeros_like(value) if none else value * weight
        pair = torch.stack([own, torch.zeros_like(own) + weight])
        total = self._reduce(pair, group=metric.meta.sync.group, reduce_op="sum")
        metric._forward_cache = total[0] / total[1]
        metric._update_count += 1  # what torchmetrics' wrapped update does, so that `compute` is allowed
        metric._computed = None
        if not metric.meta.on_epoch:
            metric.value = metric._forward_cache
        elif not none:
            metric.value = metric.value + own
            metric.cumulated_batch_size = metric.cumulated_batch_size + weight

    @staticmethod
    def _keep_matched(metric: _ResultMetric, value: Tensor, *, synced: bool) -> None:
        """Add nothing, but take part in the exchange that the other ranks are in."""
        metric._update_count += 1
        if not synced:
            return
        if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
            neutral = torch.full_like(value, float("-inf") if metric.meta.is_max_reduction else float("inf"))
        else:
            neutral = torch.zeros_like(value)
        metric._forward_cache = metric.meta.sync(neutral)
        if not metric.meta.on_epoch:
            metric.value = metric._forward_cache
