"""Samplers, loaders and trainings that several tests of loaders share."""

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_hetero import HeteroStrategy
from tests.trainer.fits import Numbers, Regression, make_trainer

SIZE, BATCH = 61, 12


def once(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Several tests check one launch of ranks; if it failed, all of them fail without launching again."""
    outcomes: dict[Any, tuple[Any, BaseException | None]] = {}

    @wraps(launch)
    def remembered(*args: Any) -> Any:
        if args not in outcomes:
            try:
                outcomes[args] = launch(*args), None
            except AssertionError as error:
                outcomes[args] = None, error
        value, failed = outcomes[args]
        if failed is not None:
            raise failed
        return value

    return remembered


class OwnSampler(Sampler[int]):
    """Another order in each epoch, by `set_epoch`."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.RandomState(self.epoch).permutation(self.size).tolist())

    def __len__(self) -> int:
        return self.size


class GlobalSampler(OwnSampler):
    """Takes its randomness from all three global generators."""

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size).tolist()
        np.random.shuffle(order)
        random.shuffle(order)
        return iter(order)


class EntropySampler(OwnSampler):
    """Takes its randomness from the system."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng().permutation(self.size).tolist())


class UnsizedSampler(Sampler[int]):
    """Does not say how many it draws."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SIZE).tolist())


class OwnBatches(Sampler[list[int]]):
    """Batches of neighbors, in a random order: each is drawn as one."""

    def __init__(self, size: int, batch: int) -> None:
        self.size, self._batch = size, batch

    def __iter__(self) -> Iterator[list[int]]:
        for first in (torch.randperm(len(self)) * self._batch).tolist():
            yield list(range(first, min(first + self._batch, self.size)))

    def __len__(self) -> int:
        return 1 + (self.size - 1) // self._batch


class OwnBatchesWithSize(OwnBatches):
    @property
    def batch_size(self) -> int:
        return self._batch


class OwnLoader(DataLoader[Any]):
    """Its constructor says nothing of a data set or a batch size."""

    def __init__(self, region: str, *, scale: float) -> None:
        super().__init__(Numbers(SIZE), batch_size=4, shuffle=True)
        self.region, self.scale = region, scale

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {**batch, "scale": self.scale}


def seed_worker(worker: int) -> None:
    torch.manual_seed(1000 + worker)


def double_collate(samples: list[Any]) -> Any:
    return {**default_collate(samples), "collated": True}


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(SIZE), **({"batch_size": 4} | options))


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "in order": loader,
    "shuffled": lambda: loader(shuffle=True),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0 + i % 3 for i in range(SIZE)], SIZE)),
    "own sampler": lambda: loader(sampler=OwnSampler(SIZE)),
    "global generators": lambda: loader(sampler=GlobalSampler(SIZE)),
    "own generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(8)),
    "without a length": lambda: loader(sampler=UnsizedSampler()),
    "drop_last": lambda: loader(shuffle=True, drop_last=True),
    "own batches": lambda: DataLoader(Numbers(SIZE), batch_sampler=OwnBatchesWithSize(SIZE, 4)),
    "torch's batches": lambda: DataLoader(
        Numbers(SIZE), batch_sampler=BatchSampler(RandomSampler(range(SIZE)), 4, drop_last=False)
    ),
    "own loader": lambda: OwnLoader("Zion", scale=2.0),
    "workers": lambda: loader(
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=3,
        worker_init_fn=seed_worker,
        collate_fn=double_collate,
        generator=torch.Generator().manual_seed(8),
        pin_memory=True,
    ),
}


def borrows(module: pl.LightningModule) -> bool:
    """Whether this rank computes other ranks' samples in the step that it is in."""
    strategy = module.trainer.strategy
    return isinstance(strategy, HeteroStrategy) and strategy.fit.borrowed


class Recording(Regression):
    """Remembers the samples of each step that count, and draws from the global generators by their number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        indices = batch["index"].tolist()
        self.seen.append([] if borrows(self) else indices)
        torch.rand(len(indices) + 3 * self.global_rank)
        np.random.rand(len(indices))
        random.random()
        return torch.nn.functional.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])


class Told(logging.Handler):
    """Collects messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def told_by_lightning() -> Told:
    """Collects what rank 0 is told from now on."""
    told = Told()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(told)
    return told


def quiet() -> None:
    """There is no GPU to pin memory for, workers of small loaders need not be kept, and some have too few samples."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="Consider setting `persistent_workers=True`")
    warnings.filterwarnings("ignore", message="a step of the .* loader has fewer samples")
    warnings.filterwarnings("ignore", message="a rank has no samples of its own in a step of an evaluation")


def fit(
    data: Any,
    strategy: dict[str, Any] | None = None,
    module: Recording | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Recording]:
    """Train on this rank; ranks begin with different seeds."""
    from lightning_hetero import HeteroStrategy

    quiet()
    module = module or Recording()
    torch.manual_seed(100 + torch.distributed.get_rank())
    chosen = HeteroStrategy(**(strategy or {"shares": [3, 1]}))
    trainer = make_trainer(chosen, torch.distributed.get_world_size(), **options)
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data)
    elif data is None:
        trainer.fit(module, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, data)
    return trainer, module


def plain(data: Any, module: Recording | None = None, **options: Any) -> tuple[pl.Trainer, Recording]:
    """The same in one plain process."""
    module = module or Recording()
    torch.manual_seed(100)
    trainer = make_trainer("auto", 1, **options)
    trainer.fit(module, data)
    return trainer, module


class Validating(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[list[int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch["index"].tolist())
        self.log("loss", torch.nn.functional.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"]))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append(batch["index"].tolist())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["y"]
