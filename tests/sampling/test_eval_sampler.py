"""The part of a loader that each rank evaluates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping
from tests.sampling.samplers import agreeing


@dataclass
class Passes:
    """An evaluation of one scope on ranks of known speed; remembers what has begun."""

    given_scope: Scope
    shares: Sequence[float]
    begun: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    def epoch(self) -> int:
        return 2

    def scope(self, sampler: EvaluationSampler) -> Scope:
        return self.given_scope

    def seconds(self, scope: Scope, samples: int) -> Sequence[float]:
        return [1 / share for share in self.shares]

    def begin(self, scope: Scope, sizes: Sequence[int]) -> None:
        self.begun.append((scope.number, sizes))


def samplers(world_size: int, size: int, passes: Passes) -> list[EvaluationSampler]:
    grouping = Grouping(4, finite=True)
    return [
        EvaluationSampler(GlobalBatches(RandomSampler(range(size)), grouping, 5, agreeing), rank, passes)
        for rank in range(world_size)
    ]


@given(st.integers(1, 5), st.integers(1, 60), st.data())
def test_ranks_take_the_batches_in_turn(world_size, size, data):
    shares = data.draw(st.lists(st.floats(0.1, 9), min_size=world_size, max_size=world_size))
    limit = data.draw(st.one_of(st.none(), st.integers(0, 20)))
    (one,) = samplers(1, size, Passes(Scope(batches=limit), [1.0]))
    ranks = samplers(world_size, size, Passes(Scope(batches=limit), shares))
    given_out = [list(rank) for rank in ranks]
    assert list(chain.from_iterable(chain.from_iterable(given_out))) == list(chain.from_iterable(one))
    assert {len(rank) for rank in ranks} == {len(one)} == {-(-size // 4)}
    assert max((len(batch) for batches in given_out for batch in batches), default=0) <= 4
    assert [list(rank) for rank in ranks] == given_out, "asking again gives the same"
    assert all(len(batches) <= (len(one) if limit is None else limit) for batches in given_out)


def test_a_pass_says_what_it_begins_with():
    passes = Passes(Scope(3), [1.0])
    (sampler,) = samplers(1, 10, passes)
    iter(sampler)
    assert passes.begun == [(3, [4, 4, 2])]


def test_side_by_side_shorter_loaders_end_or_begin_again():
    long, short = 24, 9
    for cycles in (False, True):
        scope = Scope(steps=6, cycles=cycles)
        first = [list(rank) for rank in samplers(2, long, Passes(scope, [2.0, 1.0]))]
        second = [list(rank) for rank in samplers(2, short, Passes(scope, [2.0, 1.0]))]
        assert list(map(len, first)) == [4, 2]
        assert list(map(len, second)) == ([4, 2] if cycles else [3, 0])
        if cycles:
            assert second[0] + second[1] == 2 * second[0][:3]
