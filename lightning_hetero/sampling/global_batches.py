"""The global batches of a loader: what the user's sampler draws in a pass, grouped, the same on every rank.

The user's sampler or batch sampler is wrapped, never rebuilt. How ranks agree on what was drawn is given from outside,
so that the arithmetic for all ranks can be checked in one process.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np

from lightning_hetero.sampling.random_state import SeparateRandomState

# A sampler that draws more than 10 times its length, and more than 1000 indices, is taken for one that never ends. A
# length need not be exact (geographic samplers estimate theirs), but it is not wrong by that much. Chosen.
_TIMES_LENGTH, _AT_LEAST = 10, 1000

Index = Any
"""What a sampler draws: a number, or TorchGeo's slices of space and time."""


@dataclass(frozen=True)
class Grouping:
    """How what a sampler draws is put together to global batches."""

    size: int  # draws in a global batch: indices, or whole batches of a user's batch sampler
    batched: bool = False  # each draw is a list of indices
    drop_last: bool = False  # leave out a last global batch that is not full
    finite: bool = False  # a pass is drawn to its end before it begins, even if the sampler has no length (evaluation)

    def __call__(self, draws: Iterable[Any]) -> Iterator[list[Index]]:
        """Global batches, one list of indices each, put together as they are needed."""
        iterator = iter(draws)
        for group in iter(lambda: list(islice(iterator, self.size)), []):
            if self.drop_last and len(group) < self.size:
                return
            yield list(chain.from_iterable(group)) if self.batched else group


def index_hash(batches: Sequence[Sequence[Index]]) -> str:
    """A hash of drawn indices; equal draws have equal hashes on every rank.

    Different indices that print alike (an object whose `repr` hides its value) have the same hash; equal ones that
    print differently only cost a broadcast.
    """
    plain = [[index.tolist() if hasattr(index, "tolist") else index for index in batch] for batch in batches]
    return hashlib.blake2b(repr(plain).encode(), digest_size=16).hexdigest()


class AgreeOnIndices(Protocol):
    """Makes all ranks use the same indices: `batches` where they are the same everywhere, rank 0's otherwise."""

    def __call__(self, batches: list[list[Index]], *, complete: bool) -> list[list[Index]]: ...


class GlobalBatches:
    """The global batches of one loader, pass by pass.

    Args:
        sampler: the user's sampler (draws indices) or batch sampler (draws lists of indices).
        grouping: of what it draws.
        seed: shared by all ranks.
        agree: called once a pass with all of its global batches, or, where they are endless, with the first one only
            (`complete=False`).
    """

    def __init__(self, sampler: Iterable[Any], grouping: Grouping, seed: int, agree: AgreeOnIndices) -> None:
        self.sampler = sampler
        self._grouping, self._seed, self._agree = grouping, seed, agree
        self._pass: tuple[int, int] | None = None  # that was drawn last: its epoch, and its number in the epoch
        self._drawn: list[list[Index]] = []
        self._undrawn: Iterator[list[Index]] = iter(())
        self._length: int | None = None
        # Some samplers draw to compute their length, and some have none after all.
        with suppress(TypeError, NotImplementedError), SeparateRandomState(seed).active():
            self._length = len(sampler) if isinstance(sampler, Sized) else None
        self.endless = not grouping.finite and self._length is None
        """Whether a pass may have no end, so that global batches are drawn one by one as they are needed."""

    def _draws(self) -> Iterable[Any]:
        """All that the sampler draws in a pass, cut at its length where it never ends, as in one process."""
        if self._length is None:
            return self.sampler
        limit = max(_TIMES_LENGTH * self._length, _AT_LEAST)
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

    def draw(self, epoch: int, number: int) -> None:
        """Draw a pass over the sampler, unless it is the one that was drawn last.

        Args:
            epoch: the trainer's epoch; given to `set_epoch` of the sampler and of the one inside a batch sampler.
            number: of the pass in the epoch, from 0; loaders that are cycled have several.
        """
        if self._pass == (epoch, number):
            return
        for sampler in (self.sampler, getattr(self.sampler, "sampler", None)):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        state = SeparateRandomState(int(np.random.SeedSequence([self._seed, epoch, number]).generate_state(1)[0]))
        if self.endless:
            self._undrawn = self._one_by_one(state)
            self._drawn = [*self._agree(list(islice(self._undrawn, 1)), complete=False)]
        else:
            with state.active():
                drawn = list(self._grouping(self._draws()))
            self._drawn = self._agree(drawn, complete=True)
        self._pass = (epoch, number)

    @property
    def first_size(self) -> int:
        """Samples of the first global batch that was drawn; 0 when there is none."""
        return len(self._drawn[0]) if self._drawn else 0

    def batches(self, may_restart: Callable[[], bool]) -> Iterator[list[Index]]:
        """The global batches of the pass that was drawn last; remembered while the pass may restart from its start."""
        yield from tuple(self._drawn)
        for batch in self._undrawn:
            if may_restart():
                self._drawn.append(batch)
            yield batch

    def __len__(self) -> int:
        """Global batches in the pass that was drawn last; a TypeError where the sampler has no length."""
        if self.endless:
            raise TypeError(f"{type(self.sampler).__name__} has no length")
        return len(self._drawn)
