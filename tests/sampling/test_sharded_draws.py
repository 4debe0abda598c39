"""Draws of samplers that shard by rank are told from draws that are merely random, on 1 to 16 ranks."""

from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_hetero.sampling.sharded_draws import are_shards, declares_shard

RANKS = st.integers(2, 16)


def shards_of(size: int, world_size: int, *, drop_last: bool = False, shuffle: bool = True) -> list[list[int]]:
    return [
        list(DistributedSampler(range(size), world_size, rank, shuffle=shuffle, drop_last=drop_last))
        for rank in range(world_size)
    ]


@given(RANKS, st.integers(32, 600), st.booleans(), st.booleans())
def test_shards_are_recognized_whether_padded_or_cut(world_size, size, drop_last, shuffle):
    assert are_shards(shards_of(size, world_size, drop_last=drop_last, shuffle=shuffle), size, declared=False)


@given(RANKS, st.integers(32, 600))
def test_a_users_own_slices_are_recognized(world_size, size):
    order = np.random.RandomState(size).permutation(size).tolist()
    assert are_shards([order[rank::world_size] for rank in range(world_size)], size, declared=False)
    length = ceil(size / world_size)
    blocks = [order[rank * length : (rank + 1) * length] for rank in range(world_size)]
    assert are_shards(blocks, size, declared=False)


@pytest.mark.parametrize("size", [2, 7, 16])
def test_small_data_in_equal_parts_are_shards(size):
    assert are_shards([list(range(rank, size, 2)) for rank in range(2)], size, declared=False)


def test_shards_of_a_part_of_the_data_are_recognized():
    """As of a training set that is a fifth of all samples."""
    order = np.random.RandomState(1).permutation(1000)[:200].tolist()
    assert are_shards([order[rank::2] for rank in range(2)], 1000, declared=False)


@given(RANKS, st.integers(1, 600), st.integers(0, 10**6), st.booleans())
def test_permutations_are_random(world_size, size, seed, declared):
    """Also those of samplers whose seed is the rank, and which therefore know it."""
    generator = np.random.default_rng(seed)
    draws = [generator.permutation(size).tolist() for _ in range(world_size)]
    assert not are_shards(draws, size, declared=declared)


@given(RANKS, st.integers(32, 600), st.integers(0, 10**6), st.floats(0.05, 1), st.booleans())
def test_random_parts_and_repetitions_are_random(world_size, size, seed, fraction, replace):
    generator = np.random.default_rng(seed)
    count = max(1, int(fraction * size))
    draws = [generator.choice(size, count, replace=replace).tolist() for _ in range(world_size)]
    assert not are_shards(draws, size, declared=False)


def test_random_places_are_random_though_none_is_drawn_twice():
    places = np.random.default_rng(3).random((2, 50)).tolist()
    draws: list[list[Any]] = [[(slice(x, x + 1.0), slice(0.0, 1.0)) for x in row] for row in places]
    assert not are_shards(draws, 100, declared=False)
    assert are_shards(draws, None, declared=True)


def repeated(size: int, world_size: int, repeats: int) -> list[list[int]]:
    """Repeated augmentation, as torchvision's and timm's samplers do it: copies of an image lie on different ranks."""
    copies = np.repeat(np.random.RandomState(2).permutation(size), repeats).tolist()
    return [copies[rank::world_size][: size // world_size] for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_repeated_augmentation_is_recognized_by_what_the_sampler_says(world_size):
    """With three ranks and three copies, all ranks draw the same third of the data."""
    draws = repeated(480, world_size, 3)
    assert (draws[0] == draws[1]) == (world_size == 3)
    assert are_shards(draws, 480, declared=True)


class OwnShard:
    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank


@pytest.mark.parametrize(
    ("sampler", "declares"),
    [
        (DistributedSampler(range(9), 4, 1), True),
        (BatchSampler(DistributedSampler(range(9), 4, 1), 2, drop_last=False), True),
        (OwnShard(4, 1), True),
        (OwnShard(4, 2), False),
        (OwnShard(1, 0), False),
        (torch.utils.data.RandomSampler(range(9)), False),
        (range(9), False),
    ],
)
def test_what_a_sampler_declares(sampler, declares):
    assert declares_shard(sampler, 1, 4) is declares


def test_one_rank_has_no_shards():
    assert not declares_shard(OwnShard(1, 0), 0, 1)
