"""A module that moves a batch of its own to the device: the training loop does not count it."""

from functools import partial
from typing import Any

import pytest
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, make_trainer, parameters_of, plain_fit, relative_error


class Moves(Regression):
    """Moves a batch of its own in a hook; what it is trained on follows from it in `training_step`."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.moved = 0

    def _move(self, hook: str) -> Any:
        batch = default_collate([Numbers(3)[i] for i in range(3)])
        if hook in (self.hook, "training_step"):
            batch = self.trainer.strategy.batch_to_device(batch)
            self.moved += 1
        return batch

    def on_train_start(self) -> None:
        self._move("on_train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._move("on_train_batch_start")

    def on_train_batch_end(self, *_: Any) -> None:
        self._move("on_train_batch_end")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        own = self._move("training_step")
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * F.mse_loss(self.net(own["x"]).squeeze(-1), own["y"])


def moved(hook: str) -> tuple[Any, int, int, int]:
    module, strategy = Moves(hook), HeteroStrategy(shares=[3, 1])
    trainer = make_trainer(strategy, 2)
    trainer.fit(module, DataLoader(Numbers(61), batch_size=6))
    return parameters_of(module), strategy.job.batches.next_step(), trainer.global_step, module.moved


@pytest.mark.parametrize(
    ("hook", "times"),
    [("on_train_start", 1), ("on_train_batch_start", 12), ("on_train_batch_end", 12), ("training_step", 0)],
)
def test_it_is_counted_as_no_batch(hook: str, times: int) -> None:
    """The run is that of one process, and global batches are numbered one by one."""
    alone = plain_fit(Recipe(module=partial(Moves, hook)), 12)
    for parameters, batches, steps, count in run_ranks(2, moved, hook):
        assert relative_error(parameters, alone["parameters"]) <= 1e-12
        assert batches == steps == alone["step"] == 12
        assert count == 12 + times
