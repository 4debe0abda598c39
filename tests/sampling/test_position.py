"""Which pass over a loader comes next, and the step at which it begins."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.sampling.global_batches import GlobalBatches, Grouping
from lightning_hetero.sampling.position import EpochPasses, Position
from tests.sampling.samplers import SOURCES, agreeing


class Training:
    """The position of a training run."""

    def __init__(self, epoch: int = 0, step: int = 0) -> None:
        self.at = Position(epoch, step)

    def passes(self, source: str = "shuffled", size: int = 10) -> EpochPasses:
        return EpochPasses(GlobalBatches(SOURCES[source](size), Grouping(4), 7, agreeing), lambda: self.at)


def test_a_pass_begins_where_training_stands():
    training = Training(2, 5)
    passes = training.passes("list")
    assert passes.epoch is None
    first = passes.begin()
    assert list(passes.batches(first)) == [(5, [0, 1, 2, 3]), (6, [4, 5, 6, 7]), (7, [8, 9])]
    assert (passes.epoch, len(passes)) == (2, 3)


def test_the_same_pass_until_a_step_of_it_was_started():
    training = Training(0, 3)
    passes = training.passes()
    first = [*passes.batches(passes.begin())]
    assert [*passes.batches(passes.begin())] == first
    training.at = Position(0, 4)
    assert [*passes.batches(passes.begin())] != first


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 30))
def test_the_order_depends_on_the_epoch_and_not_on_what_was_drawn_before(stale, epoch, step):
    """A resumed run draws for another epoch first."""
    training = Training(stale, step)
    resumed = training.passes()
    resumed.begin()
    training.at = Position(epoch, step)
    once = Training(epoch, step).passes()
    assert [*resumed.batches(resumed.begin())] == [*once.batches(once.begin())]


def test_a_cycled_loader_goes_on_where_its_last_pass_ended():
    """If the length is unknown, Lightning prefetches a batch: training is one step behind the loader."""
    training = Training(0, 5)
    passes = training.passes()
    first = [*passes.batches(passes.begin())]
    training.at = Position(0, 7)
    second = [*passes.batches(passes.begin())]
    assert [step for step, _ in first + second] == [5, 6, 7, 8, 9, 10]
    assert [indices for _, indices in first] != [indices for _, indices in second]


def test_the_length_is_known_before_the_first_pass():
    assert len(Training().passes()) == 3
