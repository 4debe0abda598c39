"""After a resume from a checkpoint of an epoch's end, the next epoch has the order that it would have had without."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, merged, parameters_of, relative_error
from tests.trainer.loading import Recording, fit

SIZE = 24
STEPS = 4
"""Global batches of an epoch: the loader's batches have 3 samples, on two ranks."""


ENDS = {"save_on_train_epoch_end": True}
"""Saves a checkpoint when the training epoch is over, and its number is counted already."""


class Shuffled(Recording):
    """Has its own loaders, so that they can be made anew in each epoch."""

    def __init__(self, *, validates: bool = False, workers: int = 0, counts_steps: bool = False) -> None:
        super().__init__()
        self.workers = workers
        self.counts_steps = counts_steps
        if validates:
            self.val_dataloader = lambda: DataLoader(Numbers(6), batch_size=3)

    def train_dataloader(self) -> Any:
        options = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(Numbers(SIZE), batch_size=3, shuffle=True, **options)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        if self.counts_steps:  # asks for the loaders before the loops know where they stand
            total = int(self.trainer.estimated_stepping_batches)
            assert total == 3 * STEPS
        return optimizer


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # the module's options, the callback's, the Trainer's, the checkpoint of the first epoch
    "training epoch's end": ({}, ENDS, {}, "epoch=0-step=4"),
    "training epoch's end, before it validation": (
        {"validates": True},
        ENDS,
        {},
        "epoch=0-step=4",
    ),
    "validation's end": ({"validates": True}, {}, {}, "epoch=0-step=4"),
    "validation in every second epoch": ({"validates": True}, {}, {"check_val_every_n_epoch": 2}, "epoch=1-step=8"),
    "training epoch's end, validation in every second epoch": (
        {"validates": True},
        ENDS,
        {"check_val_every_n_epoch": 2},
        "epoch=0-step=4",
    ),
    "last": ({}, {"save_last": True}, {}, "last"),
    "last batch of an epoch": ({}, {"every_n_train_steps": STEPS}, {}, "epoch=0-step=4"),
    "loaders made anew": (
        {},
        ENDS,
        {"reload_dataloaders_every_n_epochs": 1},
        "epoch=0-step=4",
    ),
    "steps, last batch of an epoch": (
        {},
        {"every_n_train_steps": STEPS},
        {"max_steps": 3 * STEPS, "max_epochs": -1},
        "epoch=0-step=4",
    ),
    "steps counted in advance": ({"counts_steps": True}, ENDS, {}, "epoch=0-step=4"),
    "workers": ({"workers": 1}, ENDS, {}, "epoch=0-step=4"),
    "workers, steps counted in advance": (
        {"workers": 1, "counts_steps": True},
        ENDS,
        {},
        "epoch=0-step=4",
    ),
    "workers, last batch of an epoch": ({"workers": 1}, {"every_n_train_steps": STEPS}, {}, "epoch=0-step=4"),
}


def resumed(folder: str) -> dict[str, Any]:
    """By case: what was trained on, and the parameters, without an interruption and after a resume."""
    warnings.filterwarnings("ignore", message=".*`weights_only` was not set")
    results = {}
    for number, (case, (of_module, of_callback, of_trainer, checkpoint)) in enumerate(CASES.items()):

        def train(
            part: str, epochs: int, ckpt: str | None = None, of=(of_module, of_callback, of_trainer), number=number
        ) -> Shuffled:
            of_module, of_callback, of_trainer = of
            callback = ModelCheckpoint(
                f"{folder}/{number} {part}", filename="{epoch}-{step}", save_top_k=-1, **of_callback
            )
            options = {"max_epochs": epochs, "num_sanity_val_steps": 0, "callbacks": [callback]} | of_trainer
            return fit(None, None, Shuffled(**of_module), ckpt, enable_checkpointing=True, **options)[1]

        whole = train("whole", 3)
        first = "whole"
        if checkpoint == "last":
            first = "one epoch"
            train(first, 1)
        again = train("again", 3, f"{folder}/{number} {first}/{checkpoint}.ckpt")
        results[case] = whole.seen, again.seen, parameters_of(whole), parameters_of(again)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, resumed, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("case", CASES)
def test_a_resume_goes_on_with_the_order_of_the_next_epoch(runs: list[dict[str, Any]], case: str) -> None:
    whole, again = (merged(result[case][part] for result in runs) for part in (0, 1))
    assert len(whole) == 3 * STEPS
    assert whole[:STEPS] != whole[STEPS : 2 * STEPS]
    assert again == whole[-len(again) :]
    for result in runs:
        assert relative_error(result[case][3], result[case][2]) <= 1e-12


def resumed_by_steps(folder: str) -> tuple[list[Any], list[Any]]:
    parts = []
    for part, ckpt in (("whole", None), ("again", f"{folder}/whole/epoch=0-step=4.ckpt")):
        callback = ModelCheckpoint(f"{folder}/{part}", filename="{epoch}-{step}", save_top_k=-1, **ENDS)
        options = {"max_steps": 3 * STEPS, "max_epochs": -1, "callbacks": [callback], "enable_checkpointing": True}
        parts.append(fit(None, None, Shuffled(), ckpt, **options)[1].seen)
    return parts[0], parts[1]


def test_epochs_keep_their_orders_where_lightning_cuts_one_short(tmp_path: Path) -> None:
    """With `max_steps` and a checkpoint of a training epoch's end, Lightning takes one batch of the next epoch only.

    It does so in one process too. That batch and all later epochs are those of the uninterrupted run.
    """
    results = run_ranks(2, resumed_by_steps, str(tmp_path))
    whole, again = (merged(result[part] for result in results) for part in (0, 1))
    assert again[: 1 + STEPS] == [whole[STEPS], *whole[2 * STEPS :]]


def resumed_in_the_same_process(folder: str) -> tuple[list[Any], list[Any]]:
    options = {"max_epochs": 2, "enable_checkpointing": True}
    callback = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **ENDS)
    trainer, module = fit(None, None, Shuffled(), callbacks=[callback], **options)
    first, module.seen = module.seen, []
    trainer.fit(module, ckpt_path=f"{folder}/epoch=0.ckpt")
    return first, module.seen


def test_a_resume_in_the_same_process(tmp_path: Path) -> None:
    for first, again in run_ranks(2, resumed_in_the_same_process, str(tmp_path)):
        assert again == first[STEPS:]
