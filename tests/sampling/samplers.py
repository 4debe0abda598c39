"""Many kinds of samplers as users write them."""

import random
from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler


class Own(Sampler[int]):
    """Draws from all global generators, depends on the epoch, and remembers it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            draws = int(torch.randint(1000, ())), np.random.randint(1000), random.randrange(1000)
            yield (sum(draws) + self.epoch) % 1000

    def __len__(self) -> int:
        return self.size


class LengthDraws(Own):
    """Like some geographic samplers: `len` draws the pass, and another pass may be longer."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(1000, (self.size + int(torch.randint(4, ())),)).tolist())

    def __len__(self) -> int:
        return len(list(iter(self)))


class Entropy(Own):
    """Draws from the system's entropy: differs on every rank and in every run."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng().integers(10**9, size=self.size).tolist())


class Units(Sampler[list[int]]):
    """A batch sampler that draws each of its batches as one."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.sampler = Own(size)
        self.batch_size = batch_size
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.sampler.size, self.batch_size):
            first = 1000 * int(torch.randint(1000, ()))
            yield [first + i for i in range(min(self.batch_size, self.sampler.size - start))]

    def __len__(self) -> int:
        return 1 + (self.sampler.size - 1) // self.batch_size


class Unsized(Sampler[int]):
    """Never says how long it is; ends after `size`, or not at all."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        for number in count() if self.size is None else range(self.size):
            yield 100 * number + int(torch.randint(100, ()))


class Forever(Own):
    """Has a length, but never ends."""

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(super(Forever, self).__iter__() for _ in count())


SOURCES: dict[str, Callable[[int], Any]] = {
    "sequential": lambda n: SequentialSampler(range(n)),
    "shuffled": lambda n: RandomSampler(range(n)),
    "generator": lambda n: RandomSampler(range(n), generator=torch.Generator().manual_seed(5)),
    "weighted": lambda n: WeightedRandomSampler([1.0 + i % 3 for i in range(n)], n),
    "list": lambda n: list(range(n)),
    "own": Own,
    "length draws": LengthDraws,
    "entropy": Entropy,
}


def agreeing(batches: list[list[Any]], *, complete: bool) -> list[list[Any]]:
    """An `AgreeOnIndices` for ranks that have all drawn the same."""
    return batches
