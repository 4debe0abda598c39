"""The part of a loader that each rank evaluates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

from lightning_hetero.planning.evaluation_split import split_step
from lightning_hetero.planning.step_time import StepTimeModel
from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping
from tests.sampling.samplers import agreeing


@dataclass
class Passes:
    """An evaluation of one scope on ranks of known speed; remembers what has begun."""

    given_scope: Scope
    shares: Sequence[float]
    begun: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return len(self.shares)

    def epoch(self) -> int:
        return 2

    def scope(self, sampler: EvaluationSampler) -> Scope:
        return self.given_scope

    def splits(self, scope: Scope, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        models = [StepTimeModel((0, 1), (0.0, 1 / share), 1 / share) for share in self.shares]
        return [split_step(size, models) for size in sizes]

    def begin(self, scope: Scope, local_batches: Sequence[int]) -> None:
        self.begun.append((scope.number, local_batches))


def samplers(size: int, passes: Passes, *, batch: int = 4, fit: bool = True) -> list[EvaluationSampler]:
    return [
        EvaluationSampler(
            GlobalBatches(RandomSampler(range(size)), Grouping(batch, finite=True), 5, agreeing),
            rank,
            passes,
            equal=True,
            fit_in_a_batch=lambda _: fit,
        )
        for rank in range(passes.world_size)
    ]


SHARES = st.lists(st.floats(0.1, 9), min_size=1, max_size=6)


@given(st.integers(1, 60), SHARES, st.integers(1, 5), st.booleans(), st.booleans())
def test_each_sample_is_on_one_rank_and_all_ranks_take_the_same_steps(size, shares, batch, fit, side_by_side):
    passes = Passes(Scope(side_by_side=side_by_side), shares)
    ranks = samplers(size, passes, batch=batch, fit=fit)
    (one,) = samplers(size, Passes(Scope(), [1.0]), batch=batch)
    lengths = {len(rank) for rank in ranks}
    batches = [list(rank) for rank in ranks]
    assert lengths == {len(own) for own in batches}
    assert all(batch for own in batches for batch in own), "nobody is without a batch"
    drawn = list(chain.from_iterable(one))
    kept = [
        own[step] for step in range(len(batches[0])) for own, n in zip(batches, passes.begun, strict=True) if n[1][step]
    ]
    assert list(chain.from_iterable(kept)) == drawn, "in the order of the sampler"
    if size >= len(shares) and fit:
        assert all(all(local_batches) for _, local_batches in passes.begun), "nothing is repeated"
    assert [list(rank) for rank in ranks] == batches, "asking again gives the same"


@given(st.integers(8, 60), SHARES, st.integers(1, 3))
def test_a_limited_evaluation_takes_full_steps_from_the_front(size, shares, steps):
    batch, full = 2, 2 * len(shares)
    whole = samplers(size, Passes(Scope(), shares), batch=batch)
    ranks = samplers(size, Passes(Scope(steps=steps), shares), batch=batch)
    (one,) = samplers(size, Passes(Scope(), [1.0]), batch=batch)
    drawn = list(chain.from_iterable(one))
    parts = [list(rank) for rank in ranks]
    taken = [index for step in zip(*parts, strict=True) for part in step for index in part]
    if steps < len(whole[0]):
        assert taken == drawn[: steps * full]
    else:
        assert taken == drawn


def test_images_that_fit_in_no_batch_together_stay_apart():
    """With batches of one, five samples on three ranks; the last step is short, where no batch may have two."""
    passes = Passes(Scope(), [1.0, 1.0, 1.0])
    assert [[len(batch) for batch in rank] for rank in samplers(5, passes, batch=1)] == [[2], [2], [1]]
    passes = Passes(Scope(), [1.0, 1.0, 1.0])
    assert [[len(batch) for batch in rank] for rank in samplers(5, passes, batch=1, fit=False)] == 3 * [[1, 1]]
    assert [local for _, local in passes.begun] == [[1, 1], [1, 1], [1, 0]]


def test_side_by_side_steps_stay_full_so_that_pairs_stay():
    for side_by_side, sizes in ((False, [7, 7, 7, 6, 6]), (True, [8, 8, 8, 7, 2])):
        ranks = samplers(33, Passes(Scope(side_by_side=side_by_side), [1.0, 1.0]))
        parts = [list(rank) for rank in ranks]
        assert [sum(map(len, step)) for step in zip(*parts, strict=True)] == sizes


def test_a_pass_says_what_it_begins_with():
    passes = Passes(Scope(3), [3.0, 1.0])
    iter(samplers(20, passes)[0])
    assert passes.begun == [(3, [6, 6, 5])]
