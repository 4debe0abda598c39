"""Options of the Trainer that have to do with loaders, and several loaders at once."""

import warnings
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    DataLoader,
)

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, merged, parameters_of, relative_error
from tests.trainer.loading import (
    BATCH,
    SIZE,
    GlobalSampler,
    Recording,
    UnsizedSampler,
    Validating,
    borrows,
    fit,
    loader,
    once,
    plain,
)


class Counting(pl.Callback):
    """When validation ran."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


class Cycle(Recording):
    """OneCycleLR, whose number of steps has to be right: one step too many raises."""

    def setup(self, stage: str) -> None:
        self.steps_in_setup = self.trainer.estimated_stepping_batches

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        self.steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=int(self.steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Reloading(pl.LightningDataModule):
    """Another loader in every epoch: of other samples, in other batches."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        part = torch.utils.data.Subset(Numbers(SIZE), range(20 * self.made))
        return DataLoader(part, batch_size=5 * self.made)


def trainer_options() -> dict[str, Any]:
    """Each a short fit; global batches of 12, 6 in an epoch."""
    results: dict[str, Any] = {}
    strategy = {"shares": [3, 1], "global_batch": BATCH}

    def record(name: str, trainer: pl.Trainer, module: Recording, *more: Any) -> None:
        results[name] = (module.seen, trainer.num_training_batches, trainer.global_step, *more)

    for name, options in (
        ("limit_train_batches=2", {"limit_train_batches": 2}),
        ("limit_train_batches=0.5", {"limit_train_batches": 0.5}),
        ("overfit_batches=2", {"overfit_batches": 2}),
        ("overfit_batches=0.5", {"overfit_batches": 0.5}),
        ("max_steps=8", {"max_steps": 8, "max_epochs": -1}),
        ("fast_dev_run=3", {"fast_dev_run": 3}),
        ("accumulate_grad_batches=4", {"accumulate_grad_batches": 4}),
    ):
        trainer, module = fit(loader(), strategy, **options)
        record(name, trainer, module, len(trainer.train_dataloader), parameters_of(module))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You requested to overfit but enabled")
        record("overfit shuffled", *fit(loader(shuffle=True), strategy, overfit_batches=2))
    for name, interval in (
        ("val_check_interval=4", 4),
        ("val_check_interval=0.5", 0.5),
        ("val_check_interval=1.0", 1.0),
    ):
        counting = Counting()
        loaders = {"train": loader(shuffle=True), "val": loader(batch_size=10)}

        class Data(pl.LightningDataModule):
            def train_dataloader(self, loaders: Any = loaders) -> Any:
                return loaders["train"]

            def val_dataloader(self, loaders: Any = loaders) -> Any:
                return loaders["val"]

        trainer, module = fit(Data(), strategy, Validating(), val_check_interval=interval, callbacks=[counting])
        record(name, trainer, module, counting.at, module.evaluated)
    trainer, module = fit(loader(), strategy, Cycle(), accumulate_grad_batches=2)
    record("one cycle", trainer, module, module.steps, module.steps_in_setup)
    trainer, module = fit(Reloading(), {"shares": [3, 1]}, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    record("reloading", trainer, module, trainer.datamodule.made)
    results.update(fits_again())
    return results


def fits_again() -> dict[str, Any]:
    """Two fits with the same Trainer: the second goes on with the next epoch."""
    results = {}
    for name, make in (
        ("shuffled", lambda: loader(shuffle=True, num_workers=1)),
        ("combined", lambda: CombinedLoader(loader(shuffle=True))),
        ("unsized", lambda: loader(sampler=UnsizedSampler(), num_workers=1)),
    ):
        data, module = make(), Recording()
        trainer, _ = fit(data, {"shares": [3, 1], "global_batch": BATCH}, module, max_epochs=1)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data)
        results[f"again {name}"] = module.seen, parameters_of(module)
        _, module = fit(make(), {"shares": [3, 1], "global_batch": BATCH})
        results[f"at once {name}"] = (module.seen,)
    return results


@once
def options() -> list[dict[str, Any]]:
    return run_ranks(2, trainer_options)


def trained(name: str) -> list[list[int]]:
    return merged(result[name][0] for result in options())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("limit_train_batches=2", {"limit_train_batches": 2}),
        ("limit_train_batches=0.5", {"limit_train_batches": 0.5}),
        ("overfit_batches=2", {"overfit_batches": 2}),
        ("overfit_batches=0.5", {"overfit_batches": 0.5}),
        ("max_steps=8", {"max_steps": 8, "max_epochs": -1}),
        ("fast_dev_run=3", {"fast_dev_run": 3}),
        ("accumulate_grad_batches=4", {"accumulate_grad_batches": 4}),
    ],
)
def test_options_mean_what_they_mean_in_one_process(name, arguments):
    trainer, module = plain(loader(batch_size=BATCH), **arguments)
    assert trained(name) == module.seen
    for _, batches, steps, length, parameters in (result[name] for result in options()):
        assert batches == trainer.num_training_batches
        assert steps == trainer.global_step
        assert length == len(trainer.train_dataloader)
        assert relative_error(parameters, parameters_of(module)) <= 1e-12


def test_overfitting_stays_with_the_first_batches_in_order():
    assert trained("overfit shuffled") == 2 * [list(range(12)), list(range(12, 24))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val_check_interval=4", [4, 10]),
        ("val_check_interval=0.5", [3, 6, 9, 12]),
        ("val_check_interval=1.0", [6, 12]),
    ],
)
def test_validation_in_the_midst_of_an_epoch_changes_no_batch(name, expected):
    for _, _, _, at, evaluated in (result[name] for result in options()):
        assert at == expected
        assert len({len(batch) for batch in evaluated[-4:]}) >= 1
    assert trained(name) == trained("val_check_interval=1.0")
    seen = chain.from_iterable(chain.from_iterable(result[name][4]) for result in options())
    counts = np.bincount(list(seen))
    sanity = counts.min() != counts.max()
    assert counts.min() == len(expected), "each sample once in each validation"
    assert not sanity or counts.max() == len(expected) + 1, "and some in the sanity check"


def test_schedules_know_the_number_of_steps():
    for _, _, steps, in_configure, in_setup in (result["one cycle"] for result in options()):
        assert steps == in_configure == in_setup == 6


def test_loaders_that_are_made_anew_in_every_epoch():
    """20, 40, 60 samples in global batches of twice 5, 10, 15."""
    batches = trained("reloading")
    assert [len(batch) for batch in batches] == [10, 10, 20, 20, 30, 30]
    assert [list(chain.from_iterable(batches[i : i + 2])) for i in (0, 2, 4)] == [[*range(n)] for n in (20, 40, 60)]
    assert [len(part) for part in options()[0]["reloading"][0]] == [8, 8, 15, 15, 23, 23]
    assert all(result["reloading"][3] == 3 for result in options())


@pytest.mark.parametrize("name", ["shuffled", "combined", "unsized"])
def test_a_second_fit_goes_on_with_the_next_epoch(name):
    assert trained(f"again {name}") == trained(f"at once {name}")
    epochs = trained(f"again {name}")
    assert [sorted(chain.from_iterable(epoch)) for epoch in (epochs[:6], epochs[6:])] == [list(range(SIZE))] * 2
    first, second = (result[f"again {name}"][1] for result in options())
    assert torch.equal(first, second)


class Two(Recording):
    """The loss is a mean over the one loader plus a mean over the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a, b = batch.values() if isinstance(batch, dict) else batch
        self.other.append(b["index"].tolist() if b is not None and not borrows(self) else [])
        first = super().training_step(a, batch_idx) if a is not None else 0.0
        if a is None:
            self.seen.append([])
        if b is None:
            return first
        return first + torch.nn.functional.mse_loss(2 * self.net(b["x"]).squeeze(-1), b["y"])


def counted(module: Any, batch: Any) -> int:
    parts = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
    return len(parts[0]["y"])


SEVERAL: dict[str, Any] = {
    "dict": lambda batch: {"a": DataLoader(Numbers(48), batch), "b": DataLoader(Numbers(24), batch)},
    "max_size_cycle": lambda batch: CombinedLoader(
        [DataLoader(Numbers(24), batch), DataLoader(Numbers(48), batch)], "max_size_cycle"
    ),
    "min_size": lambda batch: CombinedLoader(
        [DataLoader(Numbers(48), batch), DataLoader(Numbers(24), batch)], "min_size"
    ),
    "max_size": lambda batch: CombinedLoader(
        [DataLoader(Numbers(48), batch), DataLoader(Numbers(24), batch)], "max_size"
    ),
}


def several_loaders() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, make in SEVERAL.items():
        trainer, module = fit(make(6), {"shares": [3, 1], "loss_count": counted}, Two())
        results[name] = module.seen, module.other, parameters_of(module), trainer.num_training_batches
    for name, workers in (("shuffled", 0), ("workers", 1)):
        pair = [loader(shuffle=True, num_workers=workers), loader(shuffle=True, num_workers=workers)]
        _, module = fit(pair, {"shares": "equal", "global_batch": BATCH, "loss_count": counted}, Two())
        results[name] = module.seen, module.other
    short = DataLoader(Numbers(24), 6, sampler=OwnSamplerOf24())
    _, module = fit([short, DataLoader(Numbers(60), 6)], {"shares": [3, 1], "loss_count": counted}, Two())
    results["cycled"] = module.seen, module.other
    return results


class OwnSamplerOf24(GlobalSampler):
    def __init__(self) -> None:
        super().__init__(24)


@once
def several() -> list[dict[str, Any]]:
    return run_ranks(2, several_loaders)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_loaders_train_as_in_one_process(name):
    trainer, module = plain(SEVERAL[name](12), Two())
    assert merged(result[name][0] for result in several()) == module.seen
    assert merged(result[name][1] for result in several()) == module.other
    for result in several():
        assert result[name][3] == trainer.num_training_batches
        assert relative_error(result[name][2], parameters_of(module)) <= 1e-12


@pytest.mark.parametrize("name", ["shuffled", "workers"])
def test_several_loaders_have_orders_of_their_own(name):
    first, second = (merged(result[name][i] for result in several()) for i in (0, 1))
    for batches in (first, second):
        for epoch in (batches[:6], batches[6:]):
            assert sorted(chain.from_iterable(epoch)) == list(range(SIZE))
    assert first != second
    assert first[:6] != first[6:]


def test_a_loader_that_is_cycled_is_drawn_anew():
    """24 samples in two global batches, five of which make an epoch of the other loader."""
    batches = merged(result["cycled"][0] for result in several())
    assert [sorted(chain.from_iterable(batches[i : i + 2])) for i in (0, 2, 5, 7)] == [list(range(24))] * 4
    assert len({tuple(batch) for batch in batches}) == 10
