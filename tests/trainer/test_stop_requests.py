"""SIGTERM to one rank, wherever it is: all ranks stop at the same step, as one process stops."""

import os
import signal
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

BATCHES = 5
"""Training batches of an epoch."""


class Signalled(Regression):
    """Some ranks are asked to stop.

    Args:
        where: a hook.
        after: training batches before it, or with it.
        ranks: that get the signal.
    """

    def __init__(self, where: str, after: int, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.where, self.after, self.ranks = where, after, ranks
        self.ended = False

    def _ask(self, where: str) -> None:
        if self.global_rank in self.ranks and (where, len(self.seen)) == (self.where, self.after):
            os.kill(os.getpid(), signal.SIGTERM)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self._ask("training_step")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._ask("validation_step")

    def on_validation_end(self) -> None:
        self._ask("on_validation_end")

    def on_train_epoch_end(self) -> None:
        self._ask("on_train_epoch_end")

    def on_train_end(self) -> None:
        self.ended = True


def stopped(where: str, after: int, ranks: tuple[int, ...] = (1,)) -> tuple[str, int, int, bool]:
    """How the run ended, its optimizer steps, its training batches, and whether training came to its end."""
    module, world_size = Signalled(where, after, ranks), dist.get_world_size()
    strategy = HeteroStrategy(shares=[3, 1][:world_size], global_batch=8)
    trainer = make_trainer(strategy, world_size, max_epochs=2, val_check_interval=2)
    try:
        trainer.fit(module, DataLoader(Numbers(8 * BATCHES), batch_size=4), DataLoader(Numbers(30), batch_size=4))
        end = "went on"
    except SIGTERMException:
        end = "stopped"
    return end, trainer.global_step, len(module.seen), module.ended


@pytest.mark.parametrize(
    ("where", "after"),
    [
        ("validation_step", 0),
        ("validation_step", 2),
        ("validation_step", 4),
        ("validation_step", 7),
        ("validation_step", 9),
        ("on_train_epoch_end", 5),
        ("on_train_epoch_end", 10),
    ],
)
def test_a_signal_between_training_batches_stops_all_ranks_before_the_next_one(where: str, after: int) -> None:
    """In the sanity check, in a validation in the middle, in the last one, and at the end of the last epoch."""
    outcome = ("stopped", after, after, False)
    got = run_ranks(2, stopped, where, after)
    if (where, after) == ("on_train_epoch_end", 5):  # the next message is that of the next batch
        outcome = ("stopped", 6, 6, False)
    assert got == [outcome] * 2


@pytest.mark.parametrize("ranks", [(0,), (0, 1)], ids=str)
def test_any_rank_may_get_the_signal(ranks: tuple[int, ...]) -> None:
    assert run_ranks(2, stopped, "validation_step", 4, ranks) == [("stopped", 4, 4, False)] * 2


@pytest.mark.parametrize(
    ("where", "after"), [("validation_step", 0), ("validation_step", 4), ("on_train_epoch_end", 10)]
)
def test_a_rank_alone_stops_there_too(where: str, after: int) -> None:
    assert run_ranks(1, stopped, where, after, (0,)) == [("stopped", after, after, False)]


@pytest.mark.parametrize("after", [1, 2, 9, 10])
def test_a_signal_in_a_training_batch_stops_all_ranks_after_it_or_the_next_one(after: int) -> None:
    """The message of a batch is on its way when its training step runs."""
    first, second = run_ranks(2, stopped, "training_step", after)
    assert first == second
    assert first[0] == "stopped"
    assert first[1] == first[2] in (after, min(after + 1, 2 * BATCHES))
    assert not first[3]
