"""Whole batches are counted off: each once, in equally many steps on all ranks."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.sampling.whole_batches import WholeBatches, turns


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=5), max_size=40), st.integers(1, 16))
def test_each_batch_once_and_all_ranks_in_step(batches, world_size):
    ranks = [list(turns(batches, rank, world_size, len)) for rank in range(world_size)]
    steps = -(-len(batches) // world_size)
    assert {len(rank) for rank in ranks} == {steps}
    taken = sorted((t.number, t.batch) for rank in ranks for t in rank if not t.repeated)
    assert taken == list(enumerate(batches))
    for step in range(steps):
        group = batches[step * world_size : (step + 1) * world_size]
        counts = (*map(len, group), *[0] * (world_size - len(group)))
        for rank in range(world_size):
            turn = ranks[rank][step]
            assert turn.counts == counts
            assert turn.repeated == (rank >= len(group))
            assert turn.batch == batches[turn.number]
            assert not turn.repeated or turn.batch == group[0]


class Stream:
    """Has no length, and counts how many of its batches were read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            self.read += 1
            yield number


def test_a_loader_says_which_steps_are_repeated():
    """As an evaluation needs it, which may read ahead."""
    whole = [WholeBatches(range(7), rank, 3, lambda _: 1) for rank in range(3)]
    for _ in range(2):
        assert [list(loader) for loader in whole] == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]
        repeated = [[loader.turn(step).repeated for step in range(3)] for loader in whole]
        assert repeated == [[False] * 3, [False, False, True], [False, False, True]]
        assert whole[1].turn(1).number == 4
        assert {len(loader) for loader in whole} == {3}


def test_no_more_is_read_than_a_step_needs():
    stream = Stream(100)
    loader: Any = WholeBatches(stream, 0, 2, lambda _: 1)
    taken = iter(loader)
    assert [next(taken), next(taken)] == [0, 2]
    assert stream.read == 4
    with pytest.raises(TypeError):
        len(loader)
