"""Counts off whole batches: of an iterable that is the same on all ranks, each rank takes every W-th batch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any


@dataclass(frozen=True)
class Turn:
    """What one rank takes in one step: batch `rank` of the next W batches."""

    batch: Any
    counts: tuple[int, ...]  # W numbers of samples in the batches of all ranks; 0 where a rank has none of its own
    borrowed: bool  # there is none for this rank, as the iterable ends: it computes the first one of the step


def turns(batches: Iterable[Any], rank: int, world_size: int, samples: Callable[[Any], int]) -> Iterator[Turn]:
    """The turns of one rank in a pass over `batches`; all ranks have equally many.

    Every rank reads all batches, and keeps its own. `samples` counts the samples of a batch.
    """
    iterator = iter(batches)
    while True:
        group = []
        for position, batch in enumerate(islice(iterator, world_size)):
            group.append((samples(batch), batch if position in (0, rank) else None))
        if not group:
            return
        position = rank if rank < len(group) else 0
        counts = (*(size for size, _ in group), *[0] * (world_size - len(group)))
        yield Turn(group[position][1], counts, borrowed=position != rank)
