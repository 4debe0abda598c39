"""`trainer.should_stop = True` on any rank, in any hook: all ranks stop after the same step, and end normally."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

BATCHES = 5
"""Training batches of an epoch."""


class Stops(Callback):
    """Some ranks set `should_stop` in the n-th call of a hook, from 1; sanity checks do not count."""

    def __init__(self, hook: str, number: int, ranks: tuple[int, ...]) -> None:
        self.number, self.ranks, self.calls = number, ranks, 0
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.calls += not trainer.sanity_checking
        if self.calls == self.number and trainer.global_rank in self.ranks:
            trainer.should_stop = True


class InStep(Regression):
    """A module that exchanges in its training step, and validates."""

    def __init__(self, stop: bool = False) -> None:
        super().__init__()
        self.stop, self.validated = stop, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.all_gather(torch.ones(2))
        if self.stop and batch_idx == 1 and self.global_rank == 1:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", 1.0)

    def on_validation_end(self) -> None:
        self.validated += 1


def fitted(module: Regression, *callbacks: Callback, validates: bool = True, **options: Any) -> tuple[int, ...]:
    """Optimizer steps, training batches, epochs and validations."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    strategy: Any = HeteroStrategy(shares=[3, 1, 1][:world_size], global_batch=8)
    trainer = make_trainer(
        strategy if world_size > 1 else "auto",
        world_size,
        **{"max_epochs": 3, "num_sanity_val_steps": 1, "callbacks": list(callbacks)} | options,
    )
    loader = DataLoader(Numbers(8 * BATCHES), batch_size=8 // world_size if world_size != 3 else 3)
    if world_size == 1:
        loader = DataLoader(Numbers(8 * BATCHES), batch_size=8)
    trainer.fit(module, loader, DataLoader(Numbers(30), batch_size=4) if validates else None)
    return trainer.global_step, len(module.seen), trainer.current_epoch, getattr(module, "validated", 0)


HOOKS: dict[str, tuple[int, int]] = {
    # The call in which it is set, and the optimizer steps until all ranks stop if it is set on one.
    "on_fit_start": (1, 0),
    "on_train_start": (1, 0),
    "on_train_epoch_start": (2, 5),
    "on_train_batch_start": (2, 2),
    "on_before_zero_grad": (2, 3),  # the others have begun the third step when they hear of it
    "on_before_optimizer_step": (2, 3),
    "on_train_batch_end": (2, 3),
    "on_train_epoch_end": (1, 5),
    "on_validation_start": (1, 5),
    "on_validation_batch_end": (1, 5),
    "on_validation_epoch_end": (1, 5),
    "on_validation_end": (1, 5),
}


def from_each_hook(ranks: tuple[int, ...], validates: bool) -> dict[str, tuple[int, ...]]:
    return {
        hook: fitted(InStep(), Stops(hook, number, ranks), validates=validates)
        for hook, (number, _) in HOOKS.items()
        if validates or "validation" not in hook
    }


@pytest.mark.parametrize(
    ("world_size", "ranks", "validates"), [(2, (0,), True), (2, (1,), False), (3, (2,), True), (3, (0, 1), False)]
)
def test_one_rank_stops_all(world_size: int, ranks: tuple[int, ...], validates: bool) -> None:
    first, *others = run_ranks(world_size, from_each_hook, ranks, validates)
    for other in others:
        assert other == first
    assert {hook: done[0] for hook, done in first.items()} == {hook: HOOKS[hook][1] for hook in first}
    assert all(steps == batches for steps, batches, _, _ in first.values())


def test_all_ranks_stop_where_one_process_does() -> None:
    """After the same step, and after a validation of their own."""
    expected = from_each_hook((0,), True)
    for rank in run_ranks(2, from_each_hook, (0, 1), True):
        assert rank == expected


OTHERS: dict[str, Callable[[], tuple[int, ...]]] = {
    "in the training step": lambda: fitted(InStep(stop=True)),
    "in the last batch": lambda: fitted(InStep(), Stops("on_train_batch_end", BATCHES, (1,))),
    "in the last batch of all": lambda: fitted(InStep(), Stops("on_train_batch_end", BATCHES, (1,)), max_epochs=1),
    "before a validation in between": lambda: fitted(
        InStep(), Stops("on_train_batch_end", 2, (1,)), val_check_interval=2
    ),
    "after a validation in between": lambda: fitted(
        InStep(), Stops("on_validation_end", 1, (1,)), val_check_interval=2
    ),
    "before the least number of steps": lambda: fitted(InStep(), Stops("on_train_batch_end", 1, (1,)), min_steps=7),
    "with accumulation": lambda: fitted(InStep(), Stops("on_train_batch_end", 1, (1,)), accumulate_grad_batches=2),
    "on two ranks one after the other": lambda: fitted(
        InStep(), Stops("on_train_batch_end", 2, (0,)), Stops("on_train_batch_start", 3, (1,))
    ),
    "by EarlyStopping": lambda: fitted(InStep(), EarlyStopping("loss", patience=1)),
}


def others() -> dict[str, tuple[int, ...]]:
    return {name: fit() for name, fit in OTHERS.items()}


def test_wherever_it_is_set() -> None:
    first, second = run_ranks(2, others)
    assert first == second
    assert first == {
        "in the training step": (3, 3, 1, 2),
        "in the last batch": (5, 5, 1, 2),
        "in the last batch of all": (5, 5, 1, 2),
        "before a validation in between": (2, 2, 1, 2),
        "after a validation in between": (3, 3, 1, 3),
        "before the least number of steps": (7, 7, 2, 3),
        "with accumulation": (1, 2, 1, 2),
        "on two ranks one after the other": (3, 3, 1, 2),
        "by EarlyStopping": (10, 10, 2, 3),
    }


class StopsBefore(Callback):
    """Asks on the last rank to stop, just before a step in which ranks borrow."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == trainer.world_size - 1 and batch_idx == 2:
            trainer.should_stop = True


def stopped_before_a_borrowed_step(world_size: int) -> int:
    trainer = make_trainer(HeteroStrategy(shares=[9, *[1] * (world_size - 1)]), world_size, callbacks=[StopsBefore()])
    trainer.fit(Regression(), DataLoader(Numbers(12 * world_size + 1), batch_size=4))
    return trainer.global_step


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_borrows_does_not_wait_for_one_that_asks(world_size: int) -> None:
    """All make the short last step, after which they stop."""
    assert run_ranks(world_size, stopped_before_a_borrowed_step, world_size) == [4] * world_size
