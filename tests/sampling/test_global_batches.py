"""The global batches of one loader, pass by pass."""

import random
import weakref
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, Sampler, SequentialSampler

from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping, index_hash
from lightning_hetero.sampling.position import EpochPasses, Position
from lightning_hetero.sampling.train_sampler import LocalBatchSampler
from tests.sampling.samplers import SOURCES, Own, Units, Unsized, agreeing

SEED = 11


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("kind", [*SOURCES, "unsized", "units"])
def test_drawing_leaves_the_global_generators_alone(kind):
    source = Unsized(20) if kind == "unsized" else Units(20, 2) if kind == "units" else SOURCES[kind](20)
    before = states()
    batches = GlobalBatches(source, Grouping(4, batched=kind == "units"), SEED, agreeing)
    passes = EpochPasses(batches, lambda: Position(0, 0))
    sampler = LocalBatchSampler(passes, Schedule(Plan(0, (3, 1))), 0, minimum=1)
    if not batches.endless:
        len(sampler)
    assert list(sampler)
    assert states() == before


def test_a_sampler_that_raises_leaves_the_global_generators_alone():
    class Broken(Own):
        def __iter__(self):
            yield int(torch.randint(9, ()))
            raise OSError("gone")

    before = states()
    with pytest.raises(OSError, match="gone"):
        GlobalBatches(Broken(3), Grouping(2), SEED, agreeing).draw(0, 0)
    assert states() == before


def test_a_large_seed():
    batches = GlobalBatches(Own(4), Grouping(2), 2**32 + 1, agreeing)
    batches.draw(0, 0)
    assert len(batches) == 2


def test_only_the_first_batch_of_an_endless_sampler_is_compared():
    asked = []

    def agree(drawn, *, complete):
        asked.append((complete, drawn))
        return drawn

    batches = GlobalBatches(Unsized(None), Grouping(3), SEED, agree)
    batches.draw(0, 0)
    assert [(complete, len(drawn)) for complete, drawn in asked] == [(False, 1)]


def test_what_was_agreed_on_is_used():
    batches = GlobalBatches(SequentialSampler(range(4)), Grouping(2), SEED, lambda drawn, complete: [[8, 9]])
    batches.draw(0, 0)
    assert list(batches.batches(lambda: False)) == [[8, 9]]
    assert (len(batches), batches.first_size) == (1, 2)
    batches.draw(0, 0)
    assert len(batches) == 1


def test_an_endless_sampler_draws_no_more_than_it_must():
    drawn = []

    class Counting(Sampler[int]):
        def __iter__(self):
            for number in count():
                drawn.append(number)
                yield number

    batches = GlobalBatches(Counting(), Grouping(4), SEED, agreeing)
    sampler = LocalBatchSampler(EpochPasses(batches, lambda: Position(0, 0)), Schedule(Plan(0, (3, 1))), 1, minimum=1)
    assert list(islice(sampler, 3)) == [[3], [7], [11]]
    assert len(drawn) <= 12


class Place:
    """An index with which to check whether it is still referenced."""


class Places(Sampler[Place]):
    """Never ends."""

    def __init__(self) -> None:
        self.kept: weakref.WeakSet[Place] = weakref.WeakSet()

    def __iter__(self):
        while True:
            place = Place()
            self.kept.add(place)
            yield place


def test_global_batches_of_an_endless_pass_are_not_kept():
    """Except those from which the pass may restart, until one of its steps has started."""
    places = Places()
    batches = GlobalBatches(places, Grouping(2), SEED, agreeing)
    batches.draw(0, 0)
    started = iter([True] * 3 + [False] * 100)
    for _ in islice(batches.batches(lambda: next(started)), 50):
        pass
    assert len(places.kept) <= 2 * 6


def test_hashes_of_indices_compare_values():
    assert index_hash([[torch.tensor(1), np.int64(2)]]) == index_hash([[1, 2]])
    assert index_hash([[1, 2], [3]]) != index_hash([[1], [2, 3]])
    assert index_hash([[1, 2]]) != index_hash([[2, 1]])
    box = (slice(0.0, 1.5, 0.5), slice(2, 3, 1))
    assert index_hash([[box]]) == index_hash([[(slice(0.0, 1.5, 0.5), slice(2, 3, 1))]])
    assert index_hash([[box]]) != index_hash([[(slice(0.0, 1.5000001, 0.5), slice(2, 3, 1))]])


def test_torchs_own_batches_are_nothing_but_the_samplers_indices():
    plain = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
    assert list(Grouping(4)(plain.sampler)) == list(plain)
    assert list(Grouping(2, batched=True)(plain)) == [list(range(8)), [8, 9]]
