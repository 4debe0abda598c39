"""Samplers with generators and other state of their own: each epoch is in the order that one process has.

That state depends on how much of each epoch was drawn: a process draws no more of an epoch that is cut short.
"""

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, merged
from tests.trainer.loading import Recording, fit, plain

SIZE, BATCH = 60, 12


class Drawing(Sampler[int]):
    """Draws one index after the other from a numpy generator."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def __iter__(self) -> Iterator[int]:
        for _ in range(SIZE):
            yield int(self.rng.integers(SIZE))

    def __len__(self) -> int:
        return SIZE


class Shuffling(Drawing):
    """Shuffles its indices in place."""

    def __init__(self) -> None:
        self.random = random.Random(5)
        self.order = list(range(SIZE))

    def __iter__(self) -> Iterator[int]:
        self.random.shuffle(self.order)
        yield from self.order


class Counting(Drawing):
    """Counts the passes that came to their end, and those that began."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        yield from np.random.RandomState(10 * self.begun + self.ended).permutation(SIZE).tolist()
        self.ended += 1


class Neighbors(Sampler[list[int]]):
    """A batch sampler, around a sampler with a generator, with a length but no batch size."""

    def __init__(self, batch: int) -> None:
        self.sampler, self.batch = Drawing(), batch

    def __iter__(self) -> Iterator[list[int]]:
        first = iter(self.sampler)
        for _ in range(len(self)):
            start = next(first)
            yield [(start + i) % SIZE for i in range(self.batch)]

    def __len__(self) -> int:
        return SIZE // self.batch


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def shared(batch: int, **options: Any) -> DataLoader[Any]:
    """The loader draws the seeds of its workers from the same generator."""
    return DataLoader(Numbers(SIZE), batch, shuffle=True, generator=generator(), **options)


def sampled(make: Callable[[], Any]) -> Callable[[int], DataLoader[Any]]:
    return lambda batch: DataLoader(Numbers(SIZE), batch, sampler=make())


LOADERS: dict[str, Callable[[int], DataLoader[Any]]] = {
    "shuffle": shared,
    "shuffle, workers": lambda batch: shared(batch, num_workers=1),
    "shuffle, persistent workers": lambda batch: shared(batch, num_workers=1, persistent_workers=True),
    "random": sampled(lambda: RandomSampler(range(SIZE), generator=generator())),
    "with replacement": sampled(lambda: RandomSampler(range(SIZE), replacement=True, generator=generator())),
    "weighted": sampled(lambda: WeightedRandomSampler([1.0] * SIZE, SIZE, generator=generator())),
    "subset": sampled(lambda: SubsetRandomSampler(range(SIZE), generator=generator())),
    "drawing": sampled(Drawing),
    "shuffling": sampled(Shuffling),
    "counting": sampled(Counting),
    "neighbors": lambda batch: DataLoader(Numbers(SIZE), batch_sampler=Neighbors(batch)),
}


class Leaving(Recording):
    """Leaves each epoch after two batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


WAYS: dict[str, tuple[type[Recording], dict[str, Any]]] = {
    "limit": (Recording, {"limit_train_batches": 2}),
    "left": (Leaving, {}),
    "complete": (Recording, {}),
}


def runs(train: Callable[..., Any], batch: int, **options: Any) -> dict[str, list[list[int]]]:
    results = {}
    for way, (module, limits) in WAYS.items():
        for name, make in LOADERS.items():
            _, trained = train(make(batch), module=module(), max_epochs=3, **limits, **options)
            results[f"{name}, {way}"] = trained.seen
    return results


def on_rank() -> dict[str, list[list[int]]]:
    return runs(fit, BATCH // 2)


@pytest.fixture(scope="module")
def results() -> list[dict[str, list[list[int]]]]:
    return run_ranks(2, on_rank)


@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOADERS)
def test_each_epoch_is_in_the_order_of_one_process(results, name, way):
    module, options = WAYS[way]
    if name == "neighbors":  # a global batch is two batches of the user's
        steps = merged(result[f"{name}, {way}"] for result in results)
        sampler, trained, drawn = Neighbors(BATCH // 2), *{"limit": (2, 2), "left": (2, 3), "complete": (5, 5)}[way]
        for epoch in range(3):
            expected = list(chain.from_iterable(list(islice(sampler, 2 * drawn))[: 2 * trained]))
            assert list(chain.from_iterable(steps[epoch * trained : (epoch + 1) * trained])) == expected
        return
    _, alone = plain(LOADERS[name](BATCH), module=module(), max_epochs=3, **options)
    assert merged(result[f"{name}, {way}"] for result in results) == alone.seen
