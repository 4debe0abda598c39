"""Training data that the strategy can't split: each rank has its own, or the run ends with a sentence."""

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, default_collate

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, merged, parameters_of, relative_error
from tests.trainer.loading import Recording, fit, loader, plain


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


class FirstOfTwo(Recording):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["split"], batch_idx)


# ---- the same on all ranks ----


def fit_batches() -> None:
    fit(Batches([*range(40)], 4))


def fit_few_batches() -> None:
    fit(Batches([*range(8)], 4), max_epochs=3)


def fit_a_stream() -> None:
    fit(Stream([*range(40)], 4))


def fit_batches_beside_a_loader() -> None:
    parts = {"split": loader(), "not split": Batches([*range(40)], 4)}
    fit(CombinedLoader(parts, "min_size"), module=FirstOfTwo())


def fit_batches_in_a_second_run() -> None:
    trainer, module = fit(loader(), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Batches([*range(40)], 4))


@pytest.mark.parametrize(
    "run",
    [fit_batches, fit_few_batches, fit_a_stream, fit_batches_beside_a_loader, fit_batches_in_a_second_run],
)
def test_the_same_batches_on_all_ranks_are_refused(run: Any) -> None:
    errors = fails_on_ranks(2, run)
    assert set(errors) == {0, 1}
    for error in errors.values():
        assert (
            "ValueError: all ranks train on the same data: the training data is an iterable that is not a DataLoader"
            in error
        )


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


def warned_of(data: IterableDataset[Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(DataLoader(data, 4), max_epochs=3)
    return [str(warning.message) for warning in caught if "the first sample" in str(warning.message)]


def warned() -> tuple[list[str], list[str]]:
    return warned_of(Whole()), warned_of(Part())


def test_an_iterable_data_set_that_is_the_same_on_all_ranks_is_a_warning() -> None:
    (of_whole, of_part), *others = run_ranks(2, warned)
    assert len(of_whole) == 1
    assert "the first sample of Whole is the same on all ranks" in of_whole[0]
    assert (of_part, others) == ([], [([], [])])


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
