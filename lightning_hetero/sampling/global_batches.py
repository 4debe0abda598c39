"""One global stream of indices, the same on every rank, cut into global batches.

The user's sampler or batch sampler is wrapped, never rebuilt. What ranks have to tell each other goes through a
callable that is given from outside, so that one process can check the arithmetic for all ranks.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import torch

# A source that draws so many times its length, and more than this, never comes to an end by itself.
_FAR, _MANY = 10, 1000

Index = Any
"""What a sampler draws: a number, or TorchGeo's slices of space and time."""


@dataclass(frozen=True)
class Chunks:
    """How a stream is cut into global batches.

    Args:
        size: entries of the stream in a global batch: samples, or whole batches of a user's batch sampler.
        batched: the stream's entries are lists of indices.
        drop_last: leave out a last global batch that is not full.
        whole: a pass is drawn to its end before it begins, also where the source has no length (evaluation).
    """

    size: int
    batched: bool = False
    drop_last: bool = False
    whole: bool = False

    def __call__(self, entries: Iterable[Any]) -> Iterator[list[Index]]:
        """Global batches, one list of indices each, lazily."""
        iterator = iter(entries)
        for group in iter(lambda: list(islice(iterator, self.size)), []):
            if self.drop_last and len(group) < self.size:
                return
            yield list(chain.from_iterable(group)) if self.batched else group


class PrivateRandomState:
    """The random state that a stream is drawn under: torch's, numpy's and Python's global generators, seeded alike.

    Nothing that a training step draws (dropout, augmentation) can move the stream, and the stream moves nothing else.
    """

    def __init__(self, seed: int) -> None:
        with self._kept():
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - samplers may draw from numpy's global generator
            random.seed(seed)
            self._state = self._read()

    @staticmethod
    def _read() -> tuple[Any, Any, Any]:
        return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the same

    @staticmethod
    def _write(state: tuple[Any, Any, Any]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002 - the same
        random.setstate(state[2])

    @classmethod
    @contextmanager
    def _kept(cls) -> Iterator[None]:
        outside = cls._read()
        try:
            yield
        finally:
            cls._write(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this state; outside, everything is as it was."""
        with self._kept():
            self._write(self._state)
            try:
                yield
            finally:
                self._state = self._read()


def fingerprint(batches: Sequence[Sequence[Index]]) -> str:
    """A hash of drawn indices; equal draws have equal hashes on every rank.

    Indices that print alike but differ (an object whose `repr` hides its value) can't be told apart; those that print
    differently though they are equal only cost a broadcast.
    """
    plain = [[index.tolist() if hasattr(index, "tolist") else index for index in batch] for batch in batches]
    return hashlib.blake2b(repr(plain).encode(), digest_size=16).hexdigest()


class Agree(Protocol):
    """Make ranks agree on what was drawn: see `GlobalBatches`."""

    def __call__(self, drawn: list[list[Index]], *, complete: bool) -> list[list[Index]]:
        """Return what all ranks use: `drawn` where it is the same everywhere, rank 0's otherwise."""


class GlobalBatches:
    """The global batches of one loader, epoch by epoch.

    Args:
        source: the user's sampler (indices) or batch sampler (lists of indices).
        chunks: how the stream is cut.
        seed: shared by all ranks.
        agree: called once a draw with all global batches of the pass; for a source without a length, with the
            first one only (`complete=False`).
    """

    def __init__(self, source: Iterable[Any], chunks: Chunks, seed: int, agree: Agree) -> None:
        self.source = source
        self._chunks = chunks
        self._seed = seed
        self._agree = agree
        self._key: tuple[int, int] | None = None
        self._drawn: list[list[Index]] = []
        self._rest: Iterator[list[Index]] = iter(())
        self._length = self._claimed_length()
        self.endless = not chunks.whole and self._length is None
        """Whether the source has no length; then it is drawn as it is needed. Evaluation always comes to an end."""

    def _claimed_length(self) -> int | None:
        if not isinstance(self.source, Sized):
            return None
        try:
            with PrivateRandomState(self._seed).active():  # some samplers draw when they are asked for their length
                return len(self.source)
        except (TypeError, NotImplementedError):
            return None

    def _entries(self) -> Iterable[Any]:
        """What the source draws. A length need not be exact, but one that is far exceeded is where the pass ends."""
        if self._length is None:
            return self.source
        limit = max(_FAR * self._length, _MANY)
        entries = list(islice(self.source, limit + 1))
        return entries if len(entries) <= limit else entries[: self._length]

    def _lazily(self, state: PrivateRandomState) -> Iterator[list[Index]]:
        """Global batches of a source that may never end, each drawn under the private state when it is needed."""
        groups = self._chunks(self.source)
        while True:
            with state.active():
                group = next(groups, None)
            if group is None:
                return
            yield group

    def draw(self, epoch: int, repeat: int) -> None:
        """Draw a pass over the source; asking again for the same one keeps what was drawn.

        Args:
            epoch: the trainer's epoch; given to `set_epoch` of whatever has one.
            repeat: the how-manieth pass within the epoch, for loaders that are cycled.
        """
        if self._key == (epoch, repeat):
            return
        for sampler in (self.source, getattr(self.source, "sampler", None)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        state = PrivateRandomState(int(np.random.SeedSequence([self._seed, epoch, repeat]).generate_state(1)[0]))
        if not self.endless:
            with state.active():
                drawn = list(self._chunks(self._entries()))
            self._drawn, self._rest = self._agree(drawn, complete=True), iter(())
        else:
            self._rest = self._lazily(state)
            self._drawn = [*self._agree(list(islice(self._rest, 1)), complete=False)]
        self._key = (epoch, repeat)

    @property
    def first_batch(self) -> int:
        """Samples of the first global batch that was drawn; 0 when there is none."""
        return len(self._drawn[0]) if self._drawn else 0

    def batches(self, keep: Callable[[], bool]) -> Iterator[list[Index]]:
        """The global batches of the pass that was drawn last.

        Args:
            keep: whether the pass may be asked for again from its start. Of a source without a length, batches that
                were drawn meanwhile are remembered.
        """
        yield from tuple(self._drawn)
        for batch in self._rest:
            if keep():
                self._drawn.append(batch)
            yield batch

    def __len__(self) -> int:
        """Global batches in the pass that was drawn last.

        Raises:
            TypeError: the source has no length.
        """
        if self.endless:
            raise TypeError(f"{type(self.source).__name__} has no length")
        return len(self._drawn)
