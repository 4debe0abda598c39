"""What is replaced on a Trainer is put back exactly as it was, whatever happens."""

from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_hetero.device.step_timer import ComputeTimer, HostClock
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.trainer.early_stop import EarlyStop
from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer
from lightning_hetero.trainer.patches import patch_trainer
from tests.trainer.fits import make_trainer


def prepare(*_: Any) -> None:
    """In place of Lightning's way to prepare a loader."""


def patched(trainer: pl.Trainer, *callbacks: Callback) -> ExitStack:
    group, timer = RankGroup(0, 1, timedelta(seconds=9)), ComputeTimer(HostClock())
    metrics = MetricSynchronizer(
        trainer, group, timer, torch.device("cpu"), loss_count=None, all_have_new_keys=lambda: False
    )
    early_stop = EarlyStop(trainer, group, lambda: 0)
    return patch_trainer(
        trainer,
        metrics,
        early_stop,
        prepare_dataloader=prepare,
        before_batch=prepare,
        on_sigterm=prepare,
        borrows=lambda: False,
        callbacks=callbacks,
    )


def attributes(trainer: pl.Trainer) -> list[dict[str, Any]]:
    epoch_loop = trainer.fit_loop.epoch_loop
    loops = [trainer.fit_loop, epoch_loop, epoch_loop.val_loop]
    owners = [trainer._data_connector, trainer._signal_connector, *loops, *trainer.callbacks]
    return [dict(vars(owner)) for owner in [trainer, *owners]] + [list(trainer.callbacks)]


def new_trainer(tmp_path: Any) -> pl.Trainer:
    callbacks = [Callback(), EarlyStopping("loss"), ModelCheckpoint(tmp_path)]
    return make_trainer("auto", 1, callbacks=callbacks, enable_checkpointing=True)


def test_what_was_there_is_put_back(tmp_path: Any) -> None:
    """An attribute that the instance had keeps its value, one that it had not goes; once or twice is the same."""
    trainer = new_trainer(tmp_path)
    users = trainer._data_connector._prepare_dataloader = lambda *_: "the user's own"
    before = attributes(trainer)
    mine = Callback()
    patches = patched(trainer, mine)
    assert trainer._data_connector._prepare_dataloader is prepare
    assert trainer.callbacks[0] is mine
    assert trainer.fit_loop.epoch_loop._results is not before[4]["_results"]
    patches.close()
    assert attributes(trainer) == before
    trainer.callbacks.append(late := Callback())
    patches.close()
    assert trainer._data_connector._prepare_dataloader is users
    assert trainer.callbacks[-1] is late


@pytest.mark.parametrize(
    ("owner", "name"), [("_data_connector", "_prepare_dataloader"), ("_signal_connector", "_sigterm_notifier_fn")]
)
def test_a_lightning_without_one_of_them(tmp_path: Any, monkeypatch: Any, owner: str, name: str) -> None:
    """One sentence that names it, and what was replaced before it is put back."""
    trainer = new_trainer(tmp_path)
    monkeypatch.delattr(type(getattr(trainer, owner)), name)
    before = attributes(trainer)
    with pytest.raises(RuntimeError, match=rf"^this Lightning has no Trainer\.{owner}\.{name}: use lightning 2\.6$"):
        patched(trainer)
    assert attributes(trainer) == before


def test_values_are_exchanged_between_the_modules_hook_and_callbacks_that_monitor(tmp_path: Any) -> None:
    """The first of them gets its own hook too, with what Lightning gives it."""
    trainer = new_trainer(tmp_path)
    seen: list[Any] = []
    first = trainer.early_stopping_callback
    first.on_train_epoch_end = lambda *args: seen.append(args)
    patches = patched(trainer)
    first.on_train_epoch_end(trainer, None)
    assert seen == [(trainer, None)]
    patches.close()
    first.on_train_epoch_end("again")
    assert seen == [(trainer, None), ("again",)]
