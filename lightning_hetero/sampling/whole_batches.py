"""Counts off whole batches: of an iterable that is the same on all ranks, each rank takes every W-th batch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import ceil
from typing import Any, cast


@dataclass(frozen=True)
class Turn:
    """What one rank takes in one step: batch `rank` of the next W batches."""

    batch: Any
    number: int  # of the batch in the iterable, from 0
    counts: tuple[int, ...]  # W numbers of samples in the batches of all ranks; 0 where a rank has none of its own
    repeated: bool  # there is none for this rank, as the iterable ends: it repeats the first one of the step


def turns(batches: Iterable[Any], rank: int, world_size: int, samples: Callable[[Any], int]) -> Iterator[Turn]:
    """The turns of one rank in a pass over `batches`; all ranks have equally many.

    Every rank reads all batches, and keeps its own. `samples` counts the samples of a batch.
    """
    iterator = iter(batches)
    for first in count(0, world_size):
        group = []
        for position, batch in enumerate(islice(iterator, world_size)):
            group.append((samples(batch), batch if position in (0, rank) else None))
        if not group:
            return
        position = rank if rank < len(group) else 0
        counts = (*(size for size, _ in group), *[0] * (world_size - len(group)))
        yield Turn(group[position][1], first + position, counts, repeated=position != rank)


class WholeBatches:
    """An iterable of batches as one rank reads it: every W-th batch, equally many on all ranks.

    Args:
        batches: the same on all ranks.
        rank: the rank.
        world_size: W.
        samples: counts the samples of a batch.
    """

    def __init__(self, batches: Iterable[Any], rank: int, world_size: int, samples: Callable[[Any], int]) -> None:
        self._batches, self._rank, self._world_size, self._samples = batches, rank, world_size, samples
        self._read: list[Turn] = []  # of the current pass, without their batches

    def __iter__(self) -> Iterator[Any]:
        self._read = []
        for turn in turns(self._batches, self._rank, self._world_size, self._samples):
            self._read.append(Turn(None, turn.number, turn.counts, turn.repeated))
            yield turn.batch

    def turn(self, step: int) -> Turn:
        """What this rank takes in a step of the current pass, from 0, without its batch; it must have been read."""
        return self._read[step]

    def __len__(self) -> int:
        """Number of steps; a TypeError if the iterable has no length."""
        return ceil(len(cast("Any", self._batches)) / self._world_size)
