"""Training data that the strategy can't cut: whole batches are counted off, unless each rank has its own."""

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, merged, parameters_of, relative_error
from tests.trainer.loading import Recording, fit, loader, once, plain, told_by_lightning


def batches_of(indices: list[int], size: int) -> list[Any]:
    numbers = Numbers(60)
    return [default_collate([numbers[i] for i in indices[k : k + size]]) for k in range(0, len(indices), size)]


class Stream:
    """Yields batches and does not say how many; a list is not the same, Lightning takes it for several loaders."""

    def __init__(self, indices: list[int], size: int) -> None:
        self.batches = batches_of(indices, size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Batches(Stream):
    """Has a length."""

    def __len__(self) -> int:
        return len(self.batches)


class Both(Recording):
    """Trains on a loader beside an iterable, and remembers the samples of both."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.others.append(batch["not split"]["index"].tolist())
        return super().training_step(batch["split"], batch_idx)


# ---- the same on all ranks: each batch is trained on once ----


class Shuffled(Batches):
    """Draws from the global generator, which differs between ranks."""

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batches[i] for i in torch.randperm(len(self.batches)).tolist()])


def counted_off_fits() -> dict[str, Any]:
    results: dict[str, Any] = {}
    told = told_by_lightning()
    for name, data, options in (
        ("with a length", Batches([*range(40)], 4), {}),
        ("a stream", Stream([*range(40)], 4), {}),
        ("one batch too many", Batches([*range(36)], 4), {}),
        ("one batch too many in a stream", Stream([*range(36)], 4), {}),
        ("one batch", Batches([*range(4)], 4), {}),
        ("a short batch", Batches([*range(39)], 4), {}),
        ("shuffled", Shuffled([*range(40)], 4), {}),
        ("limit", Batches([*range(40)], 4), {"limit_train_batches": 2}),
        ("generator", (batch for batch in batches_of([*range(40)], 4)), {"max_epochs": 1}),
    ):
        trainer, module = fit(data, **options)
        results[name] = module.seen, parameters_of(module), trainer.num_training_batches
    results["told"] = [message for message in told.messages if "is no DataLoader" in message]
    trainer, module = fit(loader(), max_epochs=1)
    module.seen.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Batches([*range(40)], 4))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, trainer.train_dataloader)
    results["later runs"] = module.seen
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        parts = {"split": loader(), "not split": Batches([*range(40)], 4)}
        module = Both()
        fit(CombinedLoader(parts, "min_size"), module=module, max_epochs=1)
    results["beside a loader"] = module.seen, module.others
    return results


@once
def counted_off() -> list[dict[str, Any]]:
    return run_ranks(2, counted_off_fits)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("with a length", 5),
        ("a stream", None),
        ("one batch too many", 5),
        ("one batch too many in a stream", None),
        ("one batch", 1),
        ("a short batch", 5),
    ],
)
def test_batches_that_are_the_same_on_all_ranks_are_trained_on_once(name, length):
    """In half as many steps, with the gradient of both batches."""
    batches = merged(result[name][0] for result in counted_off())
    epoch, size = batches[: len(batches) // 2], {"one batch": 4, "a short batch": 39}.get(name, 40)
    size = 36 if "too many" in name else size
    assert batches == 2 * epoch
    assert list(chain.from_iterable(epoch)) == list(range(size))
    assert [len(batch) for batch in epoch[:-1]] == [8] * (len(epoch) - 1)
    assert {result[name][2] for result in counted_off()} == {length or float("inf")}
    _, module = plain(DataLoader(Subset(Numbers(60), range(size)), 8))
    for result in counted_off():
        assert relative_error(result[name][1], parameters_of(module)) <= 1e-12


def test_an_order_from_the_global_generators_is_one_order():
    batches = merged(result["shuffled"][0] for result in counted_off())
    for epoch in (batches[:5], batches[5:]):
        assert sorted(chain.from_iterable(epoch)) == list(range(40))
    assert batches[:5] != batches[5:]


def test_limits_count_steps_and_an_iterator_is_used_up():
    limited = merged(result["limit"][0] for result in counted_off())
    assert list(chain.from_iterable(limited)) == 2 * [*range(16)]
    generated = merged(result["generator"][0] for result in counted_off())
    assert list(chain.from_iterable(generated)) == [*range(40)]


def test_it_holds_in_later_runs_and_beside_a_loader():
    assert list(chain.from_iterable(merged(result["later runs"] for result in counted_off()))) == 2 * [*range(40)]
    both = [result["beside a loader"] for result in counted_off()]
    assert list(chain.from_iterable(merged(seen for seen, _ in both)))[:40] == [*range(40)]
    assert list(chain.from_iterable(merged(others for _, others in both))) == [*range(40)]


def test_what_is_counted_off_is_said_once():
    told, other = (result["told"] for result in counted_off())
    assert other == []
    assert len(told) == 9, "one for each fit"
    assert "Batches is no DataLoader, so its batches can't be cut" in told[0]


# ---- each rank's own ----


def fit_own_batches() -> tuple[Any, list[list[int]]]:
    rank = dist.get_rank()
    own = [list(range(40)), list(range(40, 60))][rank]
    _, module = fit(Batches(own, 4 if rank else 8))
    return parameters_of(module), module.seen


def test_each_ranks_own_batches_are_trained_on_and_weighted() -> None:
    results = run_ranks(2, fit_own_batches)
    together = merged(seen for _, seen in results)
    assert sorted(chain.from_iterable(together[:5])) == list(range(60))
    numbers = Numbers(60)
    joined = [default_collate([numbers[i] for i in batch]) for batch in together]
    _, module = plain(DataLoader(joined, batch_size=None), max_epochs=1)
    for parameters, _ in results:
        assert relative_error(parameters, parameters_of(module)) <= 1e-12


# ---- iterable data sets ----


class Whole(IterableDataset[Any]):
    """All samples, on every rank."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Numbers(24))


class Part(IterableDataset[Any]):
    """Each rank's own samples."""

    def __iter__(self) -> Iterator[Any]:
        numbers = Numbers(48)
        return iter(numbers[i] for i in range(dist.get_rank(), 48, dist.get_world_size()))


class Sized(Whole):
    def __len__(self) -> int:
        return 24


class AlikeAtFirst(IterableDataset[Any]):
    """Each rank's own samples, behind one that all of them have."""

    def __iter__(self) -> Iterator[Any]:
        return chain([Numbers(1)[0]], Part())


def iterable_data_sets() -> dict[str, Any]:
    results: dict[str, Any] = {}
    told = told_by_lightning()
    for name, data, options in (
        ("whole", Whole(), {}),
        ("with a length", Sized(), {}),
        ("workers", Whole(), {"num_workers": 1}),
        ("part", Part(), {}),
        ("alike at first", AlikeAtFirst(), {}),
    ):
        told.messages.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer, module = fit(DataLoader(data, 4, **options))
        warned = [str(warning.message) for warning in caught if "the first sample" in str(warning.message)]
        said = [message for message in told.messages if "is iterable" in message]
        results[name] = module.seen, trainer.num_training_batches, said, warned
    return results


@once
def iterable_data() -> list[dict[str, Any]]:
    return run_ranks(2, iterable_data_sets)


@pytest.mark.parametrize("name", ["whole", "with a length", "workers"])
def test_an_iterable_data_set_that_is_the_same_on_all_ranks_is_counted_off(name):
    results = [result[name] for result in iterable_data()]
    batches = merged(seen for seen, *_ in results)
    assert list(chain.from_iterable(batches)) == 2 * [*range(24)]
    assert len(batches) == 6
    assert {length for _, length, *_ in results} == {3 if name == "with a length" else float("inf")}
    assert [len(said) for _, _, said, _ in results] == [1, 0]
    assert [warned for *_, warned in results] == [[], []]


def test_one_that_is_each_ranks_own_is_not():
    for name, expected in (("part", [0, 0]), ("alike at first", [1, 0])):
        results = [result[name] for result in iterable_data()]
        assert [len(said) for _, _, said, _ in results] == [0, 0]
        assert [len(warned) for *_, warned in results] == expected
        assert {len(batch) for batch in results[0][0][:3]} == {6}


def groups_of_three_fits() -> list[int]:
    made = [0]
    new_group = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made[-1] += 1
        return new_group(*args, **kwargs)

    dist.new_group = counted
    data = DataLoader(Part(), 4)
    trainer, module = fit(data, max_epochs=1)
    for epochs in (2, 3):
        made.append(0)
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, data)
    return made


def test_later_fits_on_an_iterable_data_set_make_no_further_group() -> None:
    for made in run_ranks(2, groups_of_three_fits):
        assert made[0] > 0
        assert made[1:] == [0, 0]
