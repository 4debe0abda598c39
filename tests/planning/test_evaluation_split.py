"""Which samples of an evaluation each rank takes."""

from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

from lightning_hetero.planning.evaluation_split import EvaluationTimes, pieces_of, samples_of_ranks
from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import Chunks, GlobalBatches

SPEEDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)
SIZES = st.lists(st.integers(0, 9), max_size=40)


@given(SIZES, SPEEDS, st.booleans())
def test_every_sample_has_one_place(sizes, seconds, whole):
    samples = samples_of_ranks(sizes, seconds, whole=whole)
    assert sum(samples) == sum(sizes)
    pieces = [pieces_of(sizes, samples, rank) for rank in range(len(seconds))]
    taken = [(piece.batch, i) for own in pieces for piece in own for i in range(piece.first, piece.last)]
    assert taken == [(batch, i) for batch, size in enumerate(sizes) for i in range(size)]
    assert all(piece.first < piece.last for own in pieces for piece in own), "no batch is empty"
    assert [sum(piece.last - piece.first for piece in own) for own in pieces] == list(samples)
    cut = sum(map(len, pieces)) - sum(size > 0 for size in sizes)
    assert 0 <= cut <= (0 if whole else len(seconds) - 1)


@given(st.integers(1, 300), st.integers(1, 9), SPEEDS)
def test_ranks_finish_together(batches, size, seconds):
    """As early as a split by samples allows, but for the tolerance for whole batches."""
    samples = samples_of_ranks([size] * batches, seconds)
    ends = [n * s for n, s in zip(samples, seconds, strict=True)]
    best = batches * size / sum(1 / s for s in seconds)
    assert max(ends) <= 1.02 * (best + max(seconds)) + 1e-9
    one_less = min((n + 1) * s for n, s in zip(samples, seconds, strict=True))
    assert max(ends) <= 1.02 * one_less * max(size, 1) + 1e-9


def test_whole_batches_where_they_do_as_well():
    assert samples_of_ranks([10] * 10, (1.0, 4.0)) == (80, 20)
    assert samples_of_ranks([10] * 9 + [3], (1.0, 4.0)) == (75, 18), "cutting one batch saves a tenth of the time"
    assert samples_of_ranks([10] * 9 + [3], (1.0, 4.0), whole=True) == (80, 13)
    assert samples_of_ranks([64], (1.0, 1.0)) == (32, 32)
    assert samples_of_ranks([2], (1.0, 100.0)) == (2, 0), "a slow device may get nothing"
    assert samples_of_ranks([], (1.0, 1.0)) == (0, 0)


def test_times_are_learnt_for_each_stage_by_itself():
    times = EvaluationTimes(2)
    assert times.seconds("val", 8, (3, 1)) == pytest.approx((1 / 3, 1))
    times.update([{"val": [(8, 0.9), (8, 0.1), (8, 0.1), (4, 0.05)]}, {"val": [(8, 0.5)] * 3}])
    assert times.seconds("val", 8, (3, 1)) == pytest.approx((0.1, 0.5))
    assert times.seconds("test", 8, (3, 1)) == pytest.approx((1 / 3, 1))


def test_a_rank_that_was_never_measured_is_guessed_beside_those_that_were():
    times = EvaluationTimes(3)
    times.update([{"val": [(8, 0.1)]}, {"val": [(8, 0.3)]}, {}])
    assert times.seconds("val", 8, (3, 1, 2)) == pytest.approx((0.1, 0.3, 0.15))


def test_times_of_part_of_a_batch_tell_of_a_whole_one():
    times = EvaluationTimes(2)
    times.update([{"val": [(2, 0.1)] * 3}, {"val": [(8, 0.3)] * 3}])
    first, second = times.seconds("val", 8, (1, 1))
    assert 0.2 < first <= 0.4
    assert second == pytest.approx(0.3)


def test_fixed_shares_are_not_learnt():
    times = EvaluationTimes(2, learns=False)
    times.update([{"val": [(8, 0.1)]}, {"val": [(8, 0.3)]}])
    assert times.seconds("val", 8, (1, 1)) == (1, 1)


def test_a_share_of_nothing_gets_nothing():
    assert samples_of_ranks([4] * 5, EvaluationTimes(2).seconds("val", 4, (1, 0))) == (20, 0)


# -------------------------------------------------------------------------------------------------------------- sampler


def samplers(world_size: int, size: int, scope: Scope, shares: list[float], **options: Any) -> list[EvaluationSampler]:
    return [
        EvaluationSampler(
            GlobalBatches(RandomSampler(range(size)), Chunks(4, whole=True), 5, lambda drawn, complete: drawn),
            rank,
            scope=lambda _: scope,
            seconds=lambda _, __: [1 / share for share in shares],
            epoch=lambda: 2,
            **options,
        )
        for rank in range(world_size)
    ]


@given(st.integers(1, 5), st.integers(1, 60), st.data())
def test_ranks_take_the_stream_in_turn(world_size, size, data):
    shares = data.draw(st.lists(st.floats(0.1, 9), min_size=world_size, max_size=world_size))
    limit = data.draw(st.one_of(st.none(), st.integers(0, 20)))
    (one,) = samplers(1, size, Scope(batches=limit), [1.0])
    ranks = samplers(world_size, size, Scope(batches=limit), shares)
    given_out = [list(rank) for rank in ranks]
    assert list(chain.from_iterable(chain.from_iterable(given_out))) == list(chain.from_iterable(one))
    assert {len(rank) for rank in ranks} == {len(one)} == {-(-size // 4)}
    assert max((len(batch) for batches in given_out for batch in batches), default=0) <= 4
    assert [list(rank) for rank in ranks] == given_out, "asking again gives the same"
    assert all(len(batches) <= (len(one) if limit is None else limit) for batches in given_out)


def test_a_pass_says_what_it_begins_with():
    told = []
    (sampler,) = samplers(1, 10, Scope(3), [1.0], on_begin=lambda scope, sizes: told.append((scope.number, sizes)))
    iter(sampler)
    assert told == [(3, [4, 4, 2])]


def test_side_by_side_shorter_loaders_end_or_begin_again():
    long, short = 24, 9
    for cycles in (False, True):
        scope = Scope(steps=6, cycles=cycles)
        first = [list(rank) for rank in samplers(2, long, scope, [2.0, 1.0])]
        second = [list(rank) for rank in samplers(2, short, scope, [2.0, 1.0])]
        assert list(map(len, first)) == [4, 2]
        assert list(map(len, second)) == ([4, 2] if cycles else [3, 0])
        if cycles:
            assert second[0] + second[1] == 2 * second[0][:3]
