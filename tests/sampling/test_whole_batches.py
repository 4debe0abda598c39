"""Whole batches are counted off: each once, in equally many steps on all ranks."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.sampling.whole_batches import turns


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=5), max_size=40), st.integers(1, 16))
def test_each_batch_once_and_all_ranks_in_step(batches, world_size):
    ranks = [list(turns(batches, rank, world_size, len)) for rank in range(world_size)]
    steps = -(-len(batches) // world_size)
    assert {len(rank) for rank in ranks} == {steps}
    assert [turn.batch for step in zip(*ranks, strict=True) for turn in step if not turn.borrowed] == batches
    for step in range(steps):
        group = batches[step * world_size : (step + 1) * world_size]
        counts = (*map(len, group), *[0] * (world_size - len(group)))
        for rank in range(world_size):
            turn = ranks[rank][step]
            assert turn.counts == counts
            assert turn.borrowed == (rank >= len(group))
            assert turn.batch == group[0 if turn.borrowed else rank]


class Stream:
    """Has no length, and counts how many of its batches were read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            self.read += 1
            yield number


def test_no_more_is_read_than_a_step_needs():
    stream = Stream(100)
    taken = turns(stream, 0, 2, lambda _: 1)
    assert [next(taken).batch, next(taken).batch] == [0, 2]
    assert stream.read == 4
