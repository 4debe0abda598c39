"""The state of a sampler is restored after a draw, whatever keeps it."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping
from lightning_hetero.sampling.sampler_state import SamplerState
from tests.sampling.samplers import agreeing


class Keeping(Sampler[int]):
    """Changes a state of one kind when it is drawn."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __iter__(self) -> Iterator[int]:
        match self.state:
            case torch.Generator():
                yield int(torch.randint(1000, (), generator=self.state))
            case np.random.Generator():
                yield int(self.state.integers(1000))
            case np.random.RandomState():
                yield int(self.state.randint(1000))
            case random.Random():
                yield self.state.randrange(1000)
            case list():
                self.state.append(len(self.state))
                yield self.state[-1]
            case dict():
                self.state["drawn"] = self.state.get("drawn", 0) + 1
                yield self.state["drawn"]
            case np.ndarray():
                self.state += 1
                yield int(self.state[0])
            case number:
                self.state = number + 1
                self.last = number
                yield number


STATES = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "older numpy": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
    "list": lambda: [4],
    "dictionary": dict,
    "array": lambda: np.zeros(2),
    "attribute": lambda: 7,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_a_changed_state_is_restored(kind, inside):
    sampler: Any = Keeping(STATES[kind]())
    if inside:
        sampler = BatchSampler(sampler, 1, drop_last=False)
    before = SamplerState(sampler)
    first = list(sampler)
    assert before.restore()
    assert not before.restore()
    assert list(sampler) == first
    assert list(sampler) != first


def test_what_does_not_change_is_left_alone():
    sampler = RandomSampler(range(9))
    before = SamplerState(sampler)
    list(sampler)
    assert not before.restore()
    assert not SamplerState([3, 1]).restore()


def test_looking_ahead_changes_nothing_and_each_batch_is_drawn_when_it_is_taken():
    sampler = Keeping(np.random.default_rng(1))
    state = str(sampler.state.bit_generator.state)
    batches = GlobalBatches(sampler, Grouping(1, finite=True), 3, agreeing)
    batches.draw(0, 0)
    assert str(sampler.state.bit_generator.state) == state
    taken = next(batches.batches(lambda: False))
    assert str(sampler.state.bit_generator.state) != state
    assert taken == list(Keeping(np.random.default_rng(1)))
