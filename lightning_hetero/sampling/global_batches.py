"""The global batches of a loader: the indices that the user's sampler draws, grouped, the same on every rank.

The user's sampler or batch sampler is wrapped, never rebuilt. The function by which ranks agree on the indices is
passed in, so that the arithmetic for all ranks can be tested in one process.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import torch

from lightning_hetero.sampling.random_state import SeparateRandomState
from lightning_hetero.sampling.sampler_state import SamplerState

# A sampler that draws more than 10 times its length, and more than 1000 times in all, is assumed never to end. A length
# need not be exact (geographic samplers estimate theirs), but it is not wrong by that much. Chosen.
_LENGTH_FACTOR, _LEAST_LIMIT = 10, 1000

Index = Any
"""An index as a sampler draws it: a number, or TorchGeo's slices of space and time."""


@dataclass(frozen=True)
class Grouping:
    """How the draws of a sampler are grouped into global batches."""

    size: int  # draws per global batch: indices, or whole batches of a batch sampler
    batched: bool = False  # each draw is a list of indices
    drop_last: bool = False  # drop the last global batch if it is not full
    finite: bool = False  # draw a pass completely before it begins, even if the sampler has no length (evaluation)

    def __call__(self, draws: Iterable[Any]) -> Iterator[list[Index]]:
        """Global batches, one list of indices each, built lazily."""
        iterator = iter(draws)
        for group in iter(lambda: list(islice(iterator, self.size)), []):
            if self.drop_last and len(group) < self.size:
                return
            yield list(chain.from_iterable(group)) if self.batched else group


def plain_index(index: Index) -> Any:
    """A Python number, or a list of them, for a tensor or a numpy number; any other index as it is."""
    return index.tolist() if hasattr(index, "tolist") else index


def index_hash(batches: Sequence[Sequence[Index]]) -> str:
    """A hash of drawn indices; equal draws have equal hashes on every rank.

    Different indices with equal `repr` (which may not show the value) have the same hash; equal indices with different
    `repr` only cost a broadcast.
    """
    plain = [[plain_index(index) for index in batch] for batch in batches]
    return hashlib.blake2b(repr(plain).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class WorkerSeeds:
    """Where a DataLoader draws the seed of its workers, when a pass over it begins.

    That may be the generator that its sampler draws from: ``DataLoader(shuffle=True, generator=...)``.
    """

    generator: torch.Generator | None = None  # None: torch's global one
    once: bool = False  # only in the first pass, since the workers persist


class AgreeOnIndices(Protocol):
    """Makes all ranks use the same indices: `batches` where they are the same everywhere, rank 0's otherwise."""

    def __call__(self, batches: list[list[Index]], *, complete: bool) -> list[list[Index]]: ...


class GlobalBatches:
    """The global batches of one loader, pass by pass.

    Args:
        sampler: the user's sampler (draws indices) or batch sampler (draws lists of indices).
        grouping: how its draws are grouped.
        seed: shared by all ranks.
        agree: called once per pass with all of its global batches, or, if the pass may be endless, with only the first
            one (`complete=False`).
        worker_seeds: of the loader.

    A pass is drawn completely before it begins, so that ranks can compare it and its length is known. A sampler with a
    state of its own (a generator) is then put back, and drawn once more as global batches are taken: so the next pass
    is the one that a single process would draw, also after a pass that was cut short.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        grouping: Grouping,
        seed: int,
        agree: AgreeOnIndices,
        worker_seeds: WorkerSeeds = WorkerSeeds(),
    ) -> None:
        self.sampler = sampler
        self._grouping, self._seed, self._agree = grouping, seed, agree
        self._worker_seeds, self._read = worker_seeds, False
        self._again: Iterator[list[Index]] = iter(())  # the drawn pass once more, if that changes the sampler's state
        self._drawn_again = 0
        self._pass: tuple[int, int] | None = None  # epoch, and number in the epoch, of the last drawn pass
        self._drawn: list[list[Index]] = []
        self._undrawn: Iterator[list[Index]] = iter(())
        self._length: int | None = None
        # Some samplers draw to compute their length, and some define `__len__` but have no length.
        with suppress(TypeError, NotImplementedError), SeparateRandomState(seed).active():
            self._length = len(sampler) if isinstance(sampler, Sized) else None
        self.endless = not grouping.finite and self._length is None
        """Whether a pass may have no end, so that global batches are drawn one by one as they are needed."""

    def _draws(self) -> Iterable[Any]:
        """All draws of a pass, cut at the sampler's length if it never ends, as in a single process."""
        if self._length is None:
            return self.sampler
        limit = max(_LENGTH_FACTOR * self._length, _LEAST_LIMIT)
        draws = list(islice(self.sampler, limit + 1))
        return draws if len(draws) <= limit else draws[: self._length]

    def _one_by_one(self, state: SeparateRandomState) -> Iterator[list[Index]]:
        """Global batches, each drawn under the separate random state when it is needed."""
        batches = self._grouping(self.sampler)
        while True:
            with state.active():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _look_ahead(self, seed: int) -> list[list[Index]]:
        """All global batches of a pass; what drawing them has changed in the sampler is restored."""
        before = SamplerState(self.sampler)
        generator, once = self._worker_seeds.generator, self._worker_seeds.once
        with SeparateRandomState(seed).active():
            if any(generator is own for own in before.generators) and not (once and self._read):
                torch.empty((), dtype=torch.int64).random_(generator=generator)  # as the loader does before it draws
            drawn = list(self._grouping(self._draws()))
        self._again = self._one_by_one(SeparateRandomState(seed)) if before.restore() else iter(())
        self._drawn_again = 0
        return drawn

    def draw(self, epoch: int, number: int) -> None:
        """Draw a pass over the sampler, unless it is the last drawn one.

        Args:
            epoch: the trainer's epoch; passed to `set_epoch` of the sampler, and of the sampler inside a batch sampler.
            number: number of the pass in the epoch, from 0; cycled loaders have several.
        """
        if self._pass == (epoch, number):
            return
        for sampler in (self.sampler, getattr(self.sampler, "sampler", None)):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        seed = int(np.random.SeedSequence([self._seed, epoch, number]).generate_state(1)[0])
        if self.endless:
            self._undrawn = self._one_by_one(SeparateRandomState(seed))
            self._drawn = [*self._agree(list(islice(self._undrawn, 1)), complete=False)]
        else:
            self._drawn = self._agree(self._look_ahead(seed), complete=True)
        self._pass = (epoch, number)

    @property
    def first_size(self) -> int:
        """Samples in the first drawn global batch; 0 if there is none."""
        return len(self._drawn[0]) if self._drawn else 0

    def batches(self, may_restart: Callable[[], bool]) -> Iterator[list[Index]]:
        """The global batches of the last drawn pass; kept as long as the pass may restart from its beginning."""
        self._read = True
        for number, batch in enumerate(tuple(self._drawn)):
            self._draw_again(number + 1)
            yield batch
        self._draw_again(len(self._drawn) + 1)
        for batch in self._undrawn:
            if may_restart():
                self._drawn.append(batch)
            yield batch

    def _draw_again(self, batches: int) -> None:
        """Draw as many global batches again from a sampler with a state, unless that was done before."""
        while self._drawn_again < batches:
            self._drawn_again += 1
            next(self._again, None)

    def __len__(self) -> int:
        """Number of global batches in the last drawn pass; a TypeError if the sampler has no length."""
        if self.endless:
            raise TypeError(f"{type(self.sampler).__name__} has no length")
        return len(self._drawn)
