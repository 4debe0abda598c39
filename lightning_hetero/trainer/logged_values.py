"""How ranks describe a logged value to each other, and how their values are combined into one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor

Numbers = npt.NDArray[np.float64]

COLUMNS = 4
"""Numbers that a rank sends for each key: see `SynchronizedResults._epoch_row` and `StepValue.row`."""

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.max,
    "min": torch.min,
    "Python's sum": sum,
    "Python's max": max,
    "Python's min": min,
}
"""Reductions by name: names can be sent to other ranks, while a pickled function may become another object."""


@dataclass(frozen=True)
class LoggedKey:
    """What every rank has to know of a logged value, even if it has not logged it."""

    key: str  # of the collection
    meta: _Metadata  # Lightning's, without what is valid in one process only
    reduction: str  # see `REDUCTIONS`
    is_tensor: bool  # False for a torchmetrics object
    sync_dist: bool  # the argument of `self.log`

    @classmethod
    def of(cls, key: str, metric: _ResultMetric) -> "LoggedKey":
        """What this rank has registered under a key."""
        reduction = next(name for name, function in REDUCTIONS.items() if function is metric.meta.reduce_fx)
        return cls(key, replace(metric.meta, _sync=None), reduction, metric.is_tensor, metric.meta.sync.should)

    def make_metric(self, reduce: Callable[..., Any]) -> _ResultMetric:
        """What Lightning would have registered on a rank that logs the key, with the strategy's `reduce`."""
        meta = replace(self.meta, reduce_fx=REDUCTIONS[self.reduction])
        meta.sync = _Sync(_should=self.sync_dist, fn=reduce)
        return _ResultMetric(meta, self.is_tensor)

    def difference(self, other: "LoggedKey") -> str | None:
        """Why another rank's values under the same key can't be combined with these; None if they can."""
        for field in ("is_tensor", "meta.on_step", "meta.on_epoch", "reduction", "meta.dataloader_idx"):
            mine, others = map(attrgetter(field), (self, other))
            if mine != others:
                name = field.removeprefix("meta.")
                return f"{name}={mine!r} and {name}={others!r}"
        return None


def union(keys: Sequence[Sequence[LoggedKey]]) -> list[LoggedKey]:
    """All keys that ranks have, in the order of the ranks and of what each logged first.

    Raises:
        ValueError: ranks mean different things by one key.
    """
    first: dict[str, tuple[int, LoggedKey]] = {}
    for rank, of_rank in enumerate(keys):
        for key in of_rank:
            earlier, same = first.setdefault(key.key, (rank, key))
            if difference := same.difference(key):
                raise ValueError(
                    f"ranks {earlier} and {rank} log {key.meta.name!r} in different ways ({difference}): call self.log "
                    "with the same arguments on all ranks, or under another name"
                )
    return [key for _, key in first.values()]


def combined(reduction: str, values: Numbers, weights: Numbers) -> float:
    """One value over all ranks.

    Args:
        reduction: see `REDUCTIONS`.
        values: of the n ranks that have one, (n,); for a mean times the weights.
        weights: of the same ranks, (n,); only a mean uses them.

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
    means = values / weights  # (n,)
    if (means == means[0]).all():  # all equal, so exactly that: a learning rate, an epoch
        return float(means[0])
    return float(values.sum() / weights.sum())


def on_host(numbers: Sequence[Tensor | float]) -> list[float]:
    """Numbers as Python floats; those on a device are fetched in one transfer."""
    stacked = stacked_on_device(numbers)
    return with_fetched(numbers, stacked.tolist() if stacked is not None else ())


def stacked_on_device(numbers: Sequence[Tensor | float]) -> Tensor | None:
    """Those of the numbers that are on a device, (n,), in float64; None if all are on the host."""
    on_device = [number.double() for number in numbers if _is_on_device(number)]
    return torch.stack(on_device) if on_device else None


def with_fetched(numbers: Sequence[Tensor | float], fetched: Iterable[float]) -> list[float]:
    """Numbers as Python floats; those on a device are the `fetched` ones, in order."""
    remaining = iter(fetched)
    return [next(remaining) if _is_on_device(number) else float(number) for number in numbers]


def _is_on_device(number: Tensor | float) -> TypeGuard[Tensor]:
    return isinstance(number, Tensor) and number.device.type != "cpu"


def is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is known to be 0 on the host; False for one on a device, which is not read."""
    return not isinstance(weight, Tensor) and weight == 0
