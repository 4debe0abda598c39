"""What an idiom is, what it runs with, and how the values of ranks are compared with those of one process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_hetero import HeteroStrategy
from tests.trainer.fits import Numbers, make_trainer, parameters_of

WORLD_SIZE = 2
ONE, DDP = "one process", "plain DDP"
SHARES = {"hetero, shares 3:1": [3, 1], "hetero, shares 9:1": [9, 1]}
PATIENCE = timedelta(seconds=10)
"""How long a rank waits for the other one; nothing in an idiom takes nearly as long."""


class PerSample(dict[int, Any]):
    """By a sample's index, each on the rank that had it; the ranks together have what one process has."""


@dataclass(frozen=True)
class Alike:
    """The same on all ranks, while one process has something else, or nothing."""

    value: Any


@dataclass(frozen=True)
class Run:
    """One run of an idiom: in one process, or on this rank.

    Args:
        mode: `ONE`, `DDP` or one of `SHARES`.
        folder: empty, and the same on all ranks.
    """

    mode: str
    folder: Path

    @property
    def rank(self) -> int:
        return 0 if self.mode == ONE else torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        return 1 if self.mode == ONE else WORLD_SIZE

    def batch(self, batch_size: int) -> int:
        """What a loader gets: one process takes the global batch."""
        return batch_size * WORLD_SIZE // self.world_size

    def loader(self, data: Dataset[Any] | int = 32, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
        """Over so many samples of `Numbers`, or a data set; `batch_size` is that of one rank."""
        data = Numbers(data) if isinstance(data, int) else data
        if self.mode == DDP and not options.keys() & {"sampler", "shuffle"} and not isinstance(data, IterableDataset):
            # In order, as the others; Lightning's own sampler would shuffle in training.
            options["sampler"] = DistributedSampler(data, shuffle=False)
        return DataLoader(data, batch_size=self.batch(batch_size), **options)

    def trainer(self, **options: Any) -> pl.Trainer:
        """With the options of `Trainer`, and `find_unused_parameters` of the strategy."""
        unused = {"find_unused_parameters": True} if options.pop("find_unused_parameters", False) else {}
        options = {"default_root_dir": self.folder, "num_sanity_val_steps": 0} | options
        if self.mode == ONE:
            return make_trainer("auto", 1, **options)
        if self.mode == DDP:
            return make_trainer(DDPStrategy(**unused), WORLD_SIZE, **options)
        strategy = HeteroStrategy(shares=SHARES[self.mode], timeout=PATIENCE, **unused)
        return make_trainer(strategy, WORLD_SIZE, **options)

    def fit(
        self,
        module: pl.LightningModule,
        train: Any = None,
        val: Any = None,
        *,
        ckpt_path: Any = None,
        datamodule: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Train for two epochs, and return the parameters, the optimizer steps and what was logged."""
        if train is None and datamodule is None:
            train = self.loader()
        trainer = self.trainer(**options)
        trainer.fit(module, train, val, datamodule=datamodule, ckpt_path=ckpt_path)
        return {"parameters": parameters_of(module), "steps": trainer.global_step, **logged(trainer)}

    def validate(self, module: pl.LightningModule, data: Any = None, **options: Any) -> dict[str, Any]:
        trainer = self.trainer(**options)
        trainer.validate(module, self.loader() if data is None else data, verbose=False)
        return logged(trainer)

    def test(self, module: pl.LightningModule, data: Any = None, **options: Any) -> dict[str, Any]:
        trainer = self.trainer(**options)
        trainer.test(module, self.loader() if data is None else data, verbose=False)
        return logged(trainer)


def logged(trainer: pl.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@dataclass(frozen=True)
class Idiom:
    """One row of the table.

    Args:
        name: what the code does.
        function: it, as a user would write it; returns the values that are compared.
        tolerance: relative.
        sentence: regular expression that the error of each rank contains, where ranks can't do what one process does.
        reason: why they can't, for the table.
    """

    name: str
    function: Callable[[Run], dict[str, Any]]
    tolerance: float
    sentence: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Topic:
    """Idioms of one page of a documentation."""

    title: str
    idioms: list[Idiom] = field(default_factory=list)

    def idiom(
        self, name: str, *, tolerance: float = 1e-10, sentence: str | None = None, reason: str | None = None
    ) -> Callable[[Callable[[Run], dict[str, Any]]], Callable[[Run], dict[str, Any]]]:
        """Add the decorated function."""

        def add(function: Callable[[Run], dict[str, Any]]) -> Callable[[Run], dict[str, Any]]:
            self.idioms.append(Idiom(name, function, tolerance, sentence, reason))
            return function

        return add


def differences(one: dict[str, Any], ranks: list[dict[str, Any]], tolerance: float) -> list[str]:
    """What ranks have that one process has not, a line each; ranks other than the first may lack values."""
    lines = []
    for key in sorted(set(one).union(*ranks)):
        values = [rank[key] for rank in ranks if key in rank]
        if key not in one or key not in ranks[0]:
            lines.append(f"{key}: only {'on ranks' if key in ranks[0] else 'in one process'}")
        elif isinstance(one[key], PerSample):
            merged: PerSample = PerSample()
            for value in values:
                merged.update(value)
            if sum(map(len, values)) > len(merged):
                lines.append(f"{key}: several ranks have the same samples")
            if sorted(merged) != sorted(one[key]):
                lines.append(f"{key}: samples {sorted(merged)} instead of {sorted(one[key])}")
            elif not equal([merged[i] for i in sorted(merged)], [one[key][i] for i in sorted(merged)], tolerance):
                lines.append(f"{key}: {merged} instead of {one[key]}")
        elif isinstance(one[key], Alike):
            if any(not equal(value.value, values[0].value, tolerance) for value in values):
                lines.append(f"{key}: ranks differ, {[value.value for value in values]}")
        else:
            lines += [
                f"{key}: {shown(v)} on a rank instead of {shown(one[key])}"
                for v in values
                if not equal(v, one[key], tolerance)
            ]
    return lines


def shown(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def equal(a: Any, b: Any, tolerance: float) -> bool:
    """Numbers up to a part of the largest one; text, and lists of lists of different lengths, exactly."""
    try:
        x, y = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    except (TypeError, ValueError):
        return bool(a == b)
    if x.shape != y.shape:
        return False
    scale = float(y.abs().nan_to_num().max()) if y.numel() else 0.0
    return bool(torch.isclose(x, y, rtol=0.0, atol=tolerance * scale, equal_nan=True).all())
