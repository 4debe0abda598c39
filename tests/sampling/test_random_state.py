"""Random states that are saved and put back, and separate ones."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hetero.sampling.random_state import RandomState, SeparateRandomState


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), np.random.rand(), random.random()


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_a_restored_state_repeats_its_draws():
    state = RandomState.current()
    first = draws()
    draws()
    state.restore()
    assert draws() == first


def test_a_seeded_state_changes_nothing_until_it_is_restored():
    before = states()
    state = RandomState.seeded(3)
    assert states() == before
    state.restore()
    expected = float(torch.rand((), generator=torch.Generator().manual_seed(3)))
    assert draws() == (expected, np.random.RandomState(3).rand(), random.Random(3).random())


def test_separate_states_go_on_and_depend_on_their_seed_only():
    state, same, other = SeparateRandomState(5), SeparateRandomState(5), SeparateRandomState(6)

    def drawn(state):
        with state.active():
            return draws()

    first, second = drawn(state), drawn(state)
    torch.rand(3)
    assert (drawn(same), drawn(same)) == (first, second)
    assert not set(first) & set(second)
    assert not set(first) & set(drawn(other))


def test_an_error_inside_leaves_the_global_generators_alone():
    def fails() -> None:
        with SeparateRandomState(1).active():
            draws()
            raise OSError("gone")

    before = states()
    with pytest.raises(OSError, match="gone"):
        fails()
    assert states() == before


def test_a_seed_of_64_bits():
    with SeparateRandomState(2**63 - 1).active():
        draws()
