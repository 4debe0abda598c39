"""Loaders under a real Trainer: what the user has keeps working, with the global batches of one process."""

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, StackDataset, default_collate

from lightning_hetero.trainer.dataloaders import replace_batch_sampler
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, make_trainer, merged, parameters_of, relative_error
from tests.trainer.loading import (
    BATCH,
    LOADERS,
    SIZE,
    EntropySampler,
    OwnBatches,
    OwnSampler,
    Recording,
    fit,
    loader,
    once,
    plain,
)


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


def test_batches_keep_their_order_where_the_users_loader_need_not():
    """A batch is known by its number: out of order, ranks would take parts of different global batches."""
    loader = DataLoader(Numbers(8), batch_size=2, num_workers=2, in_order=False)
    clone = replace_batch_sampler(loader, loader.batch_sampler)
    assert (loader.in_order, clone.in_order) == (False, True)


class Noisy(Numbers):
    """Draws when a sample is loaded."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "noise": torch.rand(())}


class Watched(Recording):
    """Remembers the random state after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[torch.Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append(torch.get_rng_state())


def noisy_loading() -> tuple[list[list[int]], list[torch.Tensor]]:
    module = Watched()
    fit(DataLoader(Noisy(25), batch_size=6), {"shares": [1, 1]}, module, max_epochs=1)
    return module.seen, module.states


def test_loading_a_borrowed_sample_leaves_the_random_state_as_it_was():
    (own, before, after), (borrowed, *states) = (
        (seen[-1], *states[-2:]) for seen, states in run_ranks(2, noisy_loading)
    )
    assert (own, borrowed) == ([24], [])
    assert not torch.equal(before, after)
    assert torch.equal(*states)


class OwnSamples(IterableDataset[Any]):
    """Each rank's own samples, as many as it has, shared out to the workers."""

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
        trainer, module = fit(DataLoader(OwnSamples(sizes), batch_size=6, **options))
        results[name] = module.seen, parameters_of(module), trainer.global_step
    module = Recording()
    data = DataLoader(OwnSamples([60, 20]), batch_size=6, num_workers=1)
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
            # Each worker has a part of the samples, and ends by itself: 30 and 10 samples in batches of 9 and 3.
            "workers": [[9, 9, 9, 9, 9, 9, 3, 3] * 2, [3, 3, 3, 3, 3, 3, 1, 1] * 2],
            "twice": [[9, 9, 9, 9, 9], [3, 3, 3, 3, 3]],
        }[name]
    )
    if name != "twice":
        for rank, result in enumerate(iterables()):
            half = len(result[name][0]) // 2
            assert result[name][0][:half] == result[name][0][half:], "each epoch begins with the first sample"
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
