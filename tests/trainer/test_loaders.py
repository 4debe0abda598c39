"""Loaders under a real Trainer: what the user has keeps working, with the global batches of one process."""

import random
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    WeightedRandomSampler,
    default_collate,
)

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer, merged, parameters_of, relative_error

SIZE, BATCH = 61, 12


def once(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Several tests look at one launch of ranks; if it failed, all of them say so without another try."""
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


# -------------------------------------------------------------------------------------------- what a user may come with


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
    """Batches of neighbours, in a random order: each is drawn as one."""

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


class Recording(Regression):
    """Remembers the samples of each step that count, and draws from the global generators by their number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        steps = getattr(self.trainer.strategy, "_steps", None)
        indices = batch["index"].tolist()
        self.seen.append([] if steps is not None and steps.borrowed else indices)
        torch.rand(len(indices) + 3 * self.global_rank)
        np.random.rand(len(indices))
        random.random()
        return torch.nn.functional.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])


def quiet() -> None:
    """There is no GPU to pin memory for, and workers of small loaders need not be kept."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="Consider setting `persistent_workers=True`")


def fit(
    data: Any, strategy: dict[str, Any] | None = None, module: Recording | None = None, **options: Any
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
        trainer.fit(module)
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


# ---------------------------------------------------------------------------- the same batches on any number of devices


def all_loaders(shares: Any) -> dict[str, Any]:
    results = {}
    for name, make in LOADERS.items():
        trainer, module = fit(make(), {"shares": shares, "global_batch": BATCH})
        results[name] = module.seen, parameters_of(module), trainer.num_training_batches
    return results


@once
def on_devices(world_size: int) -> list[dict[str, Any]]:
    shares = {1: "equal", 2: [3, 1], 3: "auto"}[world_size]
    return run_ranks(world_size, all_loaders, shares)


def batches_on(world_size: int, name: str) -> list[list[int]]:
    return merged(result[name][0] for result in on_devices(world_size))


@pytest.mark.parametrize("name", LOADERS)
def test_global_batches_depend_neither_on_devices_nor_on_shares(name):
    one = batches_on(1, name)
    for world_size in (2, 3):
        assert batches_on(world_size, name) == one
        for result in on_devices(world_size):
            assert relative_error(result[name][1], on_devices(1)[0][name][1]) <= 1e-12
    length = on_devices(2)[1][name][2]
    assert length == (float("inf") if name == "without a length" else 5 if name == "drop_last" else 6)


@pytest.mark.parametrize("name", LOADERS)
def test_every_sample_is_trained_on_once_an_epoch(name):
    batches = batches_on(2, name)
    epochs = [batches[: len(batches) // 2], batches[len(batches) // 2 :]]
    if name != "own batches":  # the last of which is short, and may come first
        assert [len(batch) for batch in epochs[1]] == ([12] * 5 if name == "drop_last" else [12] * 5 + [1])
    for epoch in epochs:
        drawn = list(chain.from_iterable(epoch))
        if name == "drop_last":
            assert len(set(drawn)) == 60
        elif name != "weighted":
            assert sorted(drawn) == list(range(SIZE))
    if name == "in order":
        assert drawn == list(range(SIZE))
    else:
        assert epochs[0] != epochs[1]


def test_shares_are_used():
    lengths = [[len(part) for part in result["in order"][0][:6]] for result in on_devices(2)]
    assert lengths == [[9, 9, 9, 9, 9, 1], [3, 3, 3, 3, 3, 0]]


@pytest.mark.parametrize("name", ["in order", "own sampler"])
def test_one_plain_process_trains_on_the_same(name):
    make = {"in order": loader(batch_size=BATCH), "own sampler": loader(batch_size=BATCH, sampler=OwnSampler(SIZE))}
    _, module = plain(make[name])
    assert batches_on(2, name) == module.seen
    assert relative_error(on_devices(2)[0][name][1], parameters_of(module)) <= 1e-12


# -------------------------------------------------------------------------------------------------- what plain DDP does


def ddp_in_order() -> list[list[int]]:
    module = Recording()
    trainer = make_trainer("ddp", 2, max_epochs=1)
    trainer.fit(module, loader())
    return module.seen


def test_plain_ddp_shuffles_a_loader_that_is_to_stay_in_order():
    """And with an odd number of samples it trains twice on one of them."""
    drawn = list(chain.from_iterable(merged(run_ranks(2, ddp_in_order))))
    assert drawn != sorted(drawn)
    assert len(drawn) == SIZE + 1


# ------------------------------------------------------------------------------------------------- samplers and loaders


def unusual_loaders() -> dict[str, Any]:
    results: dict[str, Any] = {}
    with (
        pytest.warns(UserWarning, match="EntropySampler draws other indices on every rank, so those of rank 0")
        if (torch.distributed.get_rank() == 0)
        else warnings.catch_warnings()
    ):
        results["entropy"] = fit(loader(sampler=EntropySampler(SIZE)))[1].seen
    # Without a size the global batch is what W of its batches hold.
    trainer, module = fit(DataLoader(Numbers(SIZE), batch_sampler=OwnBatches(SIZE, 6)), max_epochs=1)
    results["batches of unknown size"] = module.seen
    results["their plan"] = trainer.strategy.plan.local_batches
    numbers = Numbers(SIZE)  # workers of these kinds import what they are given: nothing but torch is quickest
    light = StackDataset(x=numbers.x, y=numbers.y, index=torch.arange(SIZE))
    for context in ("forkserver", "spawn"):
        data = DataLoader(light, 4, num_workers=1, multiprocessing_context=context)
        results[context] = fit(data, max_epochs=1)[1].seen
    # The user shards, and Lightning leaves such loaders alone: so does the strategy.
    own = loader(sampler=DistributedSampler(range(SIZE), shuffle=True, seed=3))
    results["sharded"] = fit(own, max_epochs=1)[1].seen
    sharded = BatchSampler(DistributedSampler(range(SIZE), shuffle=False), 4, drop_last=False)
    results["sharded batches"] = fit(DataLoader(Numbers(SIZE), batch_sampler=sharded), max_epochs=1)[1].seen
    return results


@once
def unusual() -> list[dict[str, Any]]:
    return run_ranks(2, unusual_loaders)


def test_a_sampler_with_the_systems_entropy_is_drawn_on_rank_0():
    batches = merged(result["entropy"] for result in unusual())
    for epoch in (batches[:8], batches[8:]):
        assert sorted(chain.from_iterable(epoch)) == list(range(SIZE))
    assert batches[:8] != batches[8:]


def test_batches_that_are_drawn_as_one_stay_one():
    """A global batch is made of W of them, and cut by the plan."""
    batches = merged(result["batches of unknown size"] for result in unusual())
    assert unusual()[0]["their plan"] == (9, 3)
    assert sorted(chain.from_iterable(batches)) == list(range(SIZE))
    for batch in batches:
        units = [batch[i : i + 6] for i in range(0, len(batch), 6)]
        assert all(unit == list(range(unit[0], unit[0] + len(unit))) for unit in units) or 60 in batch


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
def test_workers_of_other_contexts(context):
    batches = merged(result[context] for result in unusual())
    assert list(chain.from_iterable(batches)) == list(range(SIZE))


def test_a_users_distributed_sampler_is_left_alone():
    expected = [list(DistributedSampler(range(SIZE), 2, rank, shuffle=True, seed=3)) for rank in range(2)]
    for rank, result in enumerate(unusual()):
        assert list(chain.from_iterable(result["sharded"])) == expected[rank]
        assert list(chain.from_iterable(result["sharded batches"])) == [*range(rank, SIZE, 2), *[0] * rank]


# --------------------------------------------------------------------------------------------------- iterable data sets


class Stream(IterableDataset[Any]):
    """Each rank's own stream, of its own length, shared out to the workers."""

    def __init__(self, sizes: list[int]) -> None:
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.size = sizes[self.rank]

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = Numbers(100)
        for i in range(first, self.size, step):
            yield {**numbers[(i + 50 * self.rank) % 100], "index": 1000 * self.rank + i}


def iterable_fits() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, sizes, options in (
        ("equal end", [27, 9], {}),
        ("rank 0 is dry", [20, 90], {}),
        ("rank 1 is dry", [200, 7], {}),
        ("drop_last", [29, 10], {"drop_last": True}),
        ("workers", [60, 20], {"num_workers": 2, "persistent_workers": True}),
    ):
        trainer, module = fit(DataLoader(Stream(sizes), batch_size=6, **options))
        results[name] = module.seen, parameters_of(module), trainer.global_step
    module = Recording()
    data = DataLoader(Stream([60, 20]), batch_size=6, num_workers=1)
    trainer, _ = fit(data, module=module, max_epochs=1, limit_train_batches=2)
    trainer.fit_loop.max_epochs = 2
    trainer.limit_train_batches = 3
    trainer.fit(module, data)
    results["twice"] = module.seen, parameters_of(module), trainer.global_step
    return results


@once
def iterables() -> list[dict[str, Any]]:
    return run_ranks(2, iterable_fits)


@pytest.mark.parametrize("name", ["equal end", "rank 0 is dry", "rank 1 is dry", "drop_last", "workers", "twice"])
def test_iterable_data_follow_the_plan_and_end_on_all_ranks(name):
    """Local batches are 9 and 3; an epoch ends where the first rank has no more."""
    sizes = [[len(batch) for batch in result[name][0]] for result in iterables()]
    assert (
        sizes
        == {
            "equal end": [[9, 9, 9] * 2, [3, 3, 3] * 2],
            "rank 0 is dry": [[9, 9, 2] * 2, [3, 3, 3] * 2],
            "rank 1 is dry": [[9, 9, 9] * 2, [3, 3, 1] * 2],
            "drop_last": [[9, 9, 9] * 2, [3, 3, 3] * 2],
            # Each worker has a part of the stream, and ends by itself: 30 and 10 samples in batches of 9 and 3.
            "workers": [[9, 9, 9, 9, 9, 9, 3, 3] * 2, [3, 3, 3, 3, 3, 3, 1, 1] * 2],
            "twice": [[9, 9, 9, 9, 9], [3, 3, 3, 3, 3]],
        }[name]
    )
    if name != "twice":
        for rank, result in enumerate(iterables()):
            half = len(result[name][0]) // 2
            assert result[name][0][:half] == result[name][0][half:], "each epoch reads the stream from its start"
            if name != "workers":
                assert list(chain.from_iterable(result[name][0][:half])) == [
                    1000 * rank + i for i in range(sum(sizes[rank]) // 2)
                ]


def test_the_gradient_of_iterable_data_is_that_of_all_samples():
    """One process that trains on the same samples, joined."""
    numbers = Numbers(100)
    for name in ("rank 0 is dry", "rank 1 is dry"):
        batches = merged(result[name][0] for result in iterables())
        joined = [
            default_collate([{**numbers[(i % 1000 + i // 1000 * 50) % 100], "index": i} for i in b]) for b in batches
        ]
        _, module = plain(DataLoader(joined, batch_size=None), max_epochs=1)
        assert relative_error(iterables()[1][name][1], parameters_of(module)) <= 1e-12


# ------------------------------------------------------------------------------------------------------ the user shards


def sharded_by_the_user() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    part = torch.utils.data.Subset(Numbers(SIZE), range(40) if rank == 0 else range(40, 60))
    data = DataLoader(part, batch_size=4 if rank else 8)
    trainer, module = fit(data, use_distributed_sampler=False)
    return {
        "seen": module.seen,
        "parameters": parameters_of(module),
        "left alone": trainer.train_dataloader.dataset is part
        and trainer.train_dataloader.batch_size == (4 if rank else 8),
    }


def test_a_user_who_shards_is_left_alone_and_weighted():
    results = run_ranks(2, sharded_by_the_user)
    assert all(result["left alone"] for result in results)
    assert [list(chain.from_iterable(result["seen"])) for result in results] == [2 * [*range(40)], 2 * [*range(40, 60)]]
    batches = merged(result["seen"] for result in results)
    numbers = Numbers(SIZE)
    joined = [default_collate([numbers[i] for i in batch]) for batch in batches]
    _, module = plain(DataLoader(joined, batch_size=None), max_epochs=1)
    for result in results:
        assert relative_error(result["parameters"], parameters_of(module)) <= 1e-12


class Blank(Recording):
    """Batches do not say which samples they are."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).square().mean()


def blank_but_not_the_same() -> None:
    """Other indices on each rank, all of which have the same content so far."""
    nothing = torch.zeros(40, 5, dtype=torch.float64)
    rank = torch.distributed.get_rank()
    fit(DataLoader(nothing, 4, sampler=range(rank, 40, 2)), module=Blank(), use_distributed_sampler=False)


def test_other_patches_that_look_alike_are_not_refused():
    run_ranks(2, blank_but_not_the_same)


def the_same_on_all_ranks() -> None:
    module = Recording()
    from lightning_hetero import HeteroStrategy

    torch.manual_seed(5)
    trainer = make_trainer(HeteroStrategy(), 2, use_distributed_sampler=False)
    trainer.fit(module, loader(shuffle=True))


def test_the_same_data_on_all_ranks_is_refused():
    errors = fails_on_ranks(2, the_same_on_all_ranks)
    assert set(errors) == {0, 1}
    for error in errors.values():
        assert "ValueError: all ranks draw the same patches; remove use_distributed_sampler=False" in error


# ----------------------------------------------------------------------------------------------- options of the Trainer


class Counting(pl.Callback):
    """When validation ran."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


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


# --------------------------------------------------------------------------------------------- several training loaders


class Two(Recording):
    """The loss is a mean over the one loader plus a mean over the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        a, b = batch.values() if isinstance(batch, dict) else batch
        steps = getattr(self.trainer.strategy, "_steps", None)
        borrowed = steps is not None and steps.borrowed
        self.other.append(b["index"].tolist() if b is not None and not borrowed else [])
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


# ----------------------------------------------------------------------------------------------------------- evaluation


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.written: list[tuple[list[int], list[float]]] = []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        self.written.append((list(batch_indices), prediction.tolist()))


def evaluations() -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    quiet()
    world_size = torch.distributed.get_world_size()
    results: dict[str, Any] = {}
    module, writer = Validating(), Writer()
    trainer = make_trainer(HeteroStrategy(shares=[1, 5, 2]), world_size, max_epochs=1, callbacks=[writer])
    trainer.fit(module, loader(batch_size=8))
    for name, data in (
        ("in order", loader(batch_size=8)),
        ("one more", DataLoader(Numbers(49), batch_size=8)),
        ("as many as ranks", DataLoader(Numbers(3), batch_size=8)),
        ("workers", loader(batch_size=8, num_workers=1)),
        ("own batches", DataLoader(Numbers(SIZE), batch_sampler=OwnBatchesWithSize(SIZE, 4))),
        ("ones", DataLoader(Numbers(60), batch_size=1)),
    ):
        module.evaluated = []
        trainer.validate(module, data, verbose=False)
        results[name] = module.evaluated
        module.evaluated = []
        trainer.test(module, [data, data], verbose=False)
        results[f"test {name}"] = module.evaluated
        writer.written = []
        trainer.predict(module, data, return_predictions=False)
        results[f"predict {name}"] = writer.written
    combined = CombinedLoader([loader(batch_size=8)], "sequential")
    for name in ("combined", "combined again"):
        module.evaluated = []
        trainer.validate(module, combined, verbose=False)
        results[name] = module.evaluated
    with (
        pytest.warns(UserWarning, match="a step with fewer samples than there are ranks")
        if (torch.distributed.get_rank() == 0)
        else warnings.catch_warnings()
    ):
        module.evaluated = []
        trainer.validate(module, DataLoader(Numbers(2), batch_size=8), verbose=False)
        results["too few"] = module.evaluated
    return results


@once
def evaluated() -> list[dict[str, Any]]:
    return run_ranks(3, evaluations)


@pytest.mark.parametrize(
    ("name", "size"),
    [("in order", 61), ("one more", 49), ("as many as ranks", 3), ("workers", 61), ("own batches", 61), ("ones", 60)],
)
def test_each_sample_is_evaluated_once(name, size):
    parts = [result[name] for result in evaluated()]
    assert sorted(chain.from_iterable(chain.from_iterable(parts))) == list(range(size))
    assert len({len(part) for part in parts}) == 1, "all ranks take the same number of steps"
    if name != "own batches":
        assert list(chain.from_iterable(merged(parts))) == list(range(size))
    twice = [result[f"test {name}"] for result in evaluated()]
    assert sorted(chain.from_iterable(chain.from_iterable(twice))) == sorted(2 * [*range(size)])


@pytest.mark.parametrize("name", ["in order", "as many as ranks", "workers", "own batches"])
def test_predictions_come_with_their_indices(name):
    size = 3 if name == "as many as ranks" else 61
    truth = Numbers(size).y.tolist()
    written = list(chain.from_iterable(result[f"predict {name}"] for result in evaluated()))
    assert sorted(chain.from_iterable(indices for indices, _ in written)) == list(range(size))
    for indices, predictions in written:
        assert predictions == [truth[index] for index in indices]


def test_evaluation_of_a_users_combined_loader():
    for name in ("combined", "combined again"):
        parts = [result[name] for result in evaluated()]
        assert list(chain.from_iterable(merged(parts))) == list(range(SIZE))


def test_fewer_samples_than_ranks_are_repeated_with_a_warning():
    assert [result["too few"] for result in evaluated()] == [[[0]], [[0]], [[1]]]


# ------------------------------------------------------------------------------------------------------------- TorchGeo


def make_scene(folder: str) -> None:
    """Two tiles side by side whose pixels tell where they are."""
    import rasterio
    from rasterio.transform import from_origin

    warnings.filterwarnings(
        "ignore", category=PendingDeprecationWarning
    )  # of its own code; pytest puts the filter back

    for tile in range(2):
        rows, columns = np.mgrid[0:40, 0:60]
        image = np.stack([rows, columns + 60 * tile]).astype("float32")
        mask = ((rows // 8 + columns // 8) % 3).astype("uint8")[None]
        for kind, data in (("image", image), ("mask", mask)):
            with rasterio.open(
                f"{folder}/{kind}_{tile}.tif",
                "w",
                driver="GTiff",
                width=60,
                height=40,
                count=len(data),
                dtype=data.dtype,
                crs="EPSG:32612",
                transform=from_origin(300000 + 600 * tile, 4100000, 10, 10),
            ) as file:
                file.write(data)


def geo_data(folder: str, sampler: str, batch_size: int) -> Any:
    from torchgeo.datamodules import GeoDataModule
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

    class Images(RasterDataset):
        filename_glob = "image_*.tif"

    class Masks(RasterDataset):
        filename_glob = "mask_*.tif"
        is_image = False

    class Data(GeoDataModule):
        mean = torch.tensor(0.0)
        std = torch.tensor(1.0)

        def setup(self, stage: str) -> None:
            self.dataset = Images(folder) & Masks(folder)
            if sampler == "batches":
                self.train_batch_sampler = RandomBatchGeoSampler(self.dataset, 8, batch_size, length=36)
            else:
                self.train_sampler = RandomGeoSampler(self.dataset, 8, length=34)
            self.val_sampler = GridGeoSampler(self.dataset, 8, 8)

    data = Data(Images, batch_size=batch_size, patch_size=8, num_workers=0)
    import kornia.augmentation as K

    data.train_aug = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5), K.RandomVerticalFlip(p=0.5), data_keys=None, keepdim=True
    )
    return data


class Segmentation(pl.LightningModule):
    """Kornia augments after the transfer, dropout draws in the step; remembers where the patches are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Dropout(0.5), torch.nn.Conv2d(4, 3, 1)
        )
        self.seen: list[list[Any]] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        steps = getattr(self.trainer.strategy, "_steps", None)
        self.seen.append([] if steps is not None and steps.borrowed else self.places(batch))
        return torch.nn.functional.cross_entropy(self.net(batch["image"] / 100), batch["mask"].long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated += self.places(batch)

    @staticmethod
    def places(batch: Any) -> list[Any]:
        """Rows and columns are counted from the corner of the scene; turning a patch over leaves the least."""
        return [tuple(image.amin(dim=(1, 2)).tolist()) for image in batch["image"]]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def tolerate_torchgeo() -> None:
    for package in ("torchgeo", "rasterio", "kornia", "pyproj", "geopandas", "shapely"):
        warnings.filterwarnings("ignore", module=package)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def geo_fit(folder: str, sampler: str, batch_size: int, strategy: Any, **settings: Any) -> tuple[Any, Any]:
    tolerate_torchgeo()
    module = Segmentation()
    torch.manual_seed(100)
    trainer = make_trainer(strategy, torch.distributed.get_world_size(), **settings)
    trainer.fit(module, datamodule=geo_data(folder, sampler, batch_size))
    return module.seen, module.validated


def geo_hetero(folder: str, shares: Any) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    tolerate_torchgeo()
    return {
        sampler: geo_fit(folder, sampler, 6, HeteroStrategy(shares=shares, global_batch=12))
        for sampler in ("patches", "batches")
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("torchgeo")
    folder = str(tmp_path_factory.mktemp("scene"))
    make_scene(folder)
    return folder


@pytest.fixture(scope="module")
def geo_fits(scene: str) -> dict[int, list[dict[str, Any]]]:
    return {
        1: run_ranks(1, geo_hetero, scene, "equal"),
        2: run_ranks(2, geo_hetero, scene, [5, 1]),
    }


@pytest.mark.parametrize("sampler", ["patches", "batches"])
def test_random_patches_depend_on_nothing_that_is_drawn_in_training(geo_fits, sampler):
    """Geographic samplers draw from the global generator, as dropout and augmentation do, here by unequal amounts."""
    one, two = (merged(result[sampler][0] for result in geo_fits[world_size]) for world_size in (1, 2))
    assert one == two
    # The data module drops a last batch that is not full, of 10 patches.
    assert [len(batch) for batch in two] == 2 * ([12, 12] if sampler == "patches" else [12, 12, 12])
    assert two[: len(two) // 2] != two[len(two) // 2 :]
    assert [len(part) for part in geo_fits[2][1][sampler][0]][:2] == [2, 2]


def test_all_patches_of_a_batch_are_of_one_tile(geo_fits):
    """The global batch is made of whole batches of the batch sampler, 6 patches of a tile each."""
    batches = merged(result["batches"][0] for result in geo_fits[2])
    tiles = [[int(column >= 60) for _, column in batch] for batch in batches]
    for step in tiles:
        assert len(set(step[:6])) == 1
        assert len(set(step[6:])) == 1
    assert {tile for step in tiles for tile in step} == {0, 1}


def test_the_validation_grid_is_covered_once(geo_fits):
    for sampler in ("patches", "batches"):
        once = sorted(geo_fits[1][0][sampler][1])
        both = sorted(chain.from_iterable(result[sampler][1] for result in geo_fits[2]))
        assert both == once
        assert len(once) > 2 * 60


def geo_ddp(folder: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    return geo_fit(folder, "batches", 6, "ddp", **settings)


def geo_refused(folder: str) -> Any:
    from lightning_hetero import HeteroStrategy

    return geo_fit(folder, "batches", 6, HeteroStrategy(), use_distributed_sampler=False)


def test_plain_ddp_dies_of_a_geographic_batch_sampler(scene):
    """And the way out that its message recommends gives all devices the same patches."""
    errors = fails_on_ranks(2, geo_ddp, scene, {})
    assert all(
        "TypeError:  Lightning can't inject a (distributed) sampler into your batch sampler" in error
        for error in errors.values()
    )
    first, second = run_ranks(2, geo_ddp, scene, {"use_distributed_sampler": False, "max_epochs": 1})
    assert first[0] == second[0]
    errors = fails_on_ranks(2, geo_refused, scene)
    assert all("all ranks draw the same patches; remove use_distributed_sampler=False" in e for e in errors.values())


def geo_overfit(folder: str) -> Any:
    from lightning_hetero import HeteroStrategy

    warnings.filterwarnings("ignore", message="You requested to overfit")
    return geo_fit(folder, "patches", 6, HeteroStrategy(), overfit_batches=2)


def test_overfitting_on_geographic_data_is_refused(scene):
    errors = fails_on_ranks(2, geo_overfit, scene)
    assert all("overfit_batches replaces the geographic sampler by plain numbers" in e for e in errors.values())
