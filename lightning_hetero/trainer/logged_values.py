"""A logged value as ranks describe it to each other, and how one value is made of all theirs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor

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
"""By a name that travels between processes; a function does not stay the same object on the way."""


@dataclass(frozen=True)
class LoggedKey:
    """What all ranks have to know of a logged value, also those that have not logged it.

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
    def of(cls, key: str, metric: _ResultMetric) -> "LoggedKey":
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

    def make_metric(self, reduce: Callable[..., Any]) -> _ResultMetric:
        """What Lightning would have registered on a rank that logs the key, so that this one still may.

        Args:
            reduce: the strategy's.
        """
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

    def difference(self, other: "LoggedKey") -> str | None:
        """Why another rank's values under the same key can't be put together with these; None if they can."""
        for field in ("is_tensor", "on_step", "on_epoch", "reduction", "dataloader_idx"):
            mine, others = getattr(self, field), getattr(other, field)
            if mine != others:
                return f"{field}={mine!r} and {field}={others!r}"
        return None


def union(keys: Sequence[Sequence[LoggedKey]]) -> list[LoggedKey]:
    """All keys, in the order of ranks and of what each logged first.

    Args:
        keys: of each rank.

    Raises:
        ValueError: ranks mean different things by one key.
    """
    first: dict[str, tuple[int, LoggedKey]] = {}
    for rank, of_rank in enumerate(keys):
        for key in of_rank:
            earlier, same = first.setdefault(key.key, (rank, key))
            if difference := same.difference(key):
                raise ValueError(
                    f"ranks {earlier} and {rank} log {key.name!r} in different ways ({difference}): call self.log "
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
    if (means == means[0]).all():  # exactly what each rank has: a learning rate, an epoch
        return float(means[0])
    return float(values.sum() / weights.sum())


def on_host(numbers: Sequence[Tensor | float]) -> list[float]:
    """Numbers as the host knows them; those on a device are fetched in one piece."""
    on_device = [i for i, number in enumerate(numbers) if isinstance(number, Tensor) and number.device.type != "cpu"]
    fetched: dict[int, float] = {}
    if on_device:
        together = torch.stack([torch.as_tensor(numbers[i]).to(torch.float64) for i in on_device])
        fetched = dict(zip(on_device, together.tolist(), strict=True))
    return [fetched[i] if i in fetched else float(number) for i, number in enumerate(numbers)]


def is_zero(weight: float | Tensor) -> bool:
    """Whether the host knows a weight to be 0; it does not ask the device."""
    return not isinstance(weight, Tensor) and weight == 0
