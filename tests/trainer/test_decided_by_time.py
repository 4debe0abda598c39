"""What is decided by time is decided alike on all ranks, though no two clocks are the same."""

import tempfile
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

DUE = {0: 3, 1: 5}
"""The batch after which each rank's own clock would have it validate."""


class Clocks(Callback):
    """The clocks of two ranks, an hour's interval apart; and the batches after which validation came."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = batch_idx == DUE[dist.get_rank()]
        trainer._last_val_time = float("-inf") if due else time.monotonic()

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step - 1)


class Validating(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx), batch_size=len(batch["y"]))


def loader(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(60), batch_size=batch_size)


def validate_by_time() -> list[int]:
    from lightning_hetero import HeteroStrategy

    clocks = Clocks()
    options = {"val_check_interval": "00:01:00:00", "max_epochs": 1, "callbacks": [clocks]}
    make_trainer(HeteroStrategy(shares=[3, 1]), 2, **options).fit(Validating(), loader(3), loader(3))
    return clocks.validated


def test_validation_comes_when_rank_0_says_so() -> None:
    """Fails if each rank goes by its own clock: one then waits in validation for another that trains on."""
    assert run_ranks(2, validate_by_time) == [[3], [3]]


def save_by_time(strategy: Any, devices: int, batch_size: int) -> list[float]:
    folder = tempfile.mkdtemp()
    saves = ModelCheckpoint(
        folder, monitor="loss", save_top_k=-1, train_time_interval=timedelta(0), save_on_train_epoch_end=False
    )
    options = {"max_epochs": 1, "callbacks": [saves], "enable_checkpointing": True, "log_every_n_steps": 50}
    make_trainer(strategy, devices, **options).fit(Validating(), loader(batch_size))
    return sorted(float(value) for value in saves.best_k_models.values())


def save_on_ranks() -> list[float]:
    from lightning_hetero import HeteroStrategy

    return save_by_time(HeteroStrategy(shares=[3, 1]), 2, 3)


def test_checkpoints_by_time_see_the_values_of_their_step() -> None:
    """Loggers use every fiftieth step only; the value that a checkpoint monitors is exchanged in every step."""
    alone = save_by_time("auto", 1, 6)
    assert len(alone) == 10
    for values in run_ranks(2, save_on_ranks):
        assert len(values) == 10
        assert max(abs(a - b) for a, b in zip(values, alone, strict=True)) <= 1e-6
