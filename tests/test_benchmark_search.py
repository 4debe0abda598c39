"""What benchmarks make of step times, and how they look for the best fixed split."""

import importlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _in_benchmarks():
    """The scripts import each other as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def load(name):
    return importlib.import_module(name)


# ---- statistics ----


def test_the_first_steps_of_a_turn_do_not_count():
    assert load("figures").steady([9.0, 5.0, 1.0, 2.0], 2) == [1.0, 2.0]
    with pytest.raises(ValueError, match="leave nothing"):
        load("figures").steady([9.0, 5.0], 2)


def test_a_gain_is_taken_within_rounds():
    """A machine that is half as fast in one round halves both sides; a ratio of overall medians would see a gain."""
    gain = load("figures").gain([[2.0], [4.0], [2.0]], [[1.0], [2.0], [1.0]])
    assert gain == {"median": 2.0, "least": 2.0, "greatest": 2.0}


def test_a_gain_over_a_side_that_joined_late_is_taken_in_its_rounds():
    gain = load("figures").gain([[4.0], [6.0]], [[1.0], [1.0], [2.0], [2.0]])
    assert gain == {"median": 2.5, "least": 2.0, "greatest": 3.0}


def test_the_best_split_is_chosen_within_rounds():
    """The second is faster in two rounds of three; by the median of all its step times the first would be."""
    rounds = {(3, 1): [[2.0], [1.0], [3.0]], (2, 2): [[2.2], [0.9], [2.5]]}
    assert load("figures").best_of(rounds) == (2, 2)


def test_a_turn_is_remembered_step_by_step():
    figures = load("figures")
    result = {"seconds": [0.5, 0.4], "splits": [(2, 2), (3, 1)], "observed": []}
    assert figures.steps_of(7, result) == [
        {"step": 7, "seconds": 0.5, "split": (2, 2)},
        {"step": 8, "seconds": 0.4, "split": (3, 1)},
    ]
    assert figures.steps_of(0, {"seconds": [0.5], "splits": [], "observed": []}) == [{"step": 0, "seconds": 0.5}]


def test_compute_times_are_those_of_the_last_steps_of_the_split():
    figures = load("figures")
    old = [{"split": (3, 1), "compute": [9.0, 9.0]}] * 10
    new = [{"split": (3, 1), "compute": [1.0, 2.0]}] * 10
    others = [{"split": (2, 2), "compute": [5.0, 5.0]}, {"split": (3, 1)}]
    assert figures.compute_times([*old, *new, *others], (3, 1)) == [1.0, 2.0]
    assert figures.compute_times([], (3, 1)) == []


def test_settled_is_the_step_from_which_the_split_stays_good():
    figures = load("figures")
    times = {(32, 32): 1.2, (56, 8): 0.52, (60, 4): 0.43}
    plans = figures.changes([(0, (32, 32)), (1, (32, 32)), (2, (60, 4)), (3, (56, 8)), (4, (60, 4)), (5, (60, 4))])
    assert plans == [(0, (32, 32)), (2, (60, 4)), (3, (56, 8)), (4, (60, 4))]
    assert figures.settled(plans, times) == 4
    assert figures.settled(plans[:3], times) is None
    assert figures.settled([(0, (59, 5))], times) is None  # interpolated: 0.4525, more than 5% above 0.43


def test_plans_of_a_part_of_the_run_begin_with_the_one_in_force():
    figures = load("figures")
    plans = [(0, (2, 2)), (5, (3, 1)), (9, (1, 3))]
    assert figures.plans_within(plans, 6, 12) == [(6, (3, 1)), (9, (1, 3))]
    assert figures.plans_within(plans, 5, 9) == [(5, (3, 1))]
    assert figures.plans_within(plans, 0, 5) == [(0, (2, 2))]


def test_an_unmeasured_split_is_interpolated_for_two_ranks_only():
    figures = load("figures")
    assert figures.between({(32, 32): 1.0, (48, 16): 0.5}, (40, 24)) == pytest.approx(0.75)
    assert figures.between({(32, 32): 1.0, (48, 16): 0.5}, (50, 14)) is None
    assert figures.between({(4, 4, 4): 1.0}, (5, 4, 3)) is None


def test_a_whole_run_is_compared_turn_by_turn():
    """Four steps in two turns; the machine was half as fast in the second, which is no fault of the run."""
    whole_run = load("figures").whole_run
    turns, fixed = [[3.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [2.0, 2.0]]
    assert whole_run(turns, fixed, first_step=True) == pytest.approx(6 / 8)
    assert whole_run(turns, fixed, first_step=False) == pytest.approx(5 / 5)


def test_a_run_is_as_fast_from_where_the_median_of_some_steps_is():
    as_fast_from = load("figures").as_fast_from
    turns, fixed = [[5.0, 3.0, 1.2, 1.0], [1.1, 1.0, 9.0, 1.0]], [[1.0, 1.0, 1.0, 7.0], [1.0] * 4]
    assert as_fast_from(turns, fixed, 3) == 5, "1.0, 9.0, 1.0; windows do not reach into the next turn"
    assert as_fast_from(turns, fixed, 2) == 4
    assert as_fast_from(turns, fixed, 3, tolerance=0.2) == 1
    assert as_fast_from([[2.0, 2.0]], [[1.0, 1.0]], 2) is None


def test_a_whole_run_does_not_pay_for_an_outlier_of_the_fixed_split():
    assert load("figures").whole_run([[1.0, 1.0]], [[1.0, 1.0, 50.0]], first_step=True) == 1.0


# ---- the search ----


def test_the_grid_goes_from_equal_to_beyond_proportional():
    splits = load("searching").grid([160.0, 40.0], 64, 2)
    assert splits[0] == (32, 32)
    assert (51, 13) in splits
    assert splits[-1][1] == 2
    assert all(sum(split) == 64 for split in splits)


def test_neighbors_keep_the_sum_and_the_minimum():
    neighbors = load("searching").neighbors
    assert neighbors((61, 3), 1, 2) == [(60, 4), (62, 2)]
    assert neighbors((62, 2), 1, 2) == [(61, 3)]
    assert len(neighbors((10, 10, 10), 1, 2)) == 6


class Machine:
    """Measures splits of devices with a fixed cost and a cost per sample, and counts the steps that this takes."""

    def __init__(self, fixed, per_sample, steps=6):
        self.fixed, self.per_sample = fixed, per_sample
        self.steps = {}
        self.search = load("searching").Search(self.measure, steps)

    def seconds(self, split):
        return max(f + p * b for f, p, b in zip(self.fixed, self.per_sample, split, strict=True))

    def measure(self, split, steps, goes_on):
        assert goes_on == (split in self.steps)  # each split once, but for the rest of its steps
        self.steps[split] = self.steps.get(split, 0) + steps
        return [self.seconds(split)] * steps

    def run(self, global_batch, finest=None):
        self.search.run([1 / p for p in self.per_sample], global_batch, finest)
        return self.search.best


devices = st.tuples(st.floats(0.0, 0.2), st.floats(0.002, 0.05))


@given(st.lists(devices, min_size=2, max_size=2), st.integers(8, 90))
def test_the_search_finds_the_best_split_of_two_ranks(pair, global_batch):
    machine = Machine(*zip(*pair, strict=True))
    found = machine.seconds(machine.run(global_batch, finest=1))
    best = min(machine.seconds((b, global_batch - b)) for b in range(2, global_batch - 1))
    assert found <= best / 0.995 + 1e-12


@given(st.lists(devices, min_size=3, max_size=3))
def test_the_search_stops_where_no_neighbor_of_three_ranks_is_better(triple):
    machine = Machine(*zip(*triple, strict=True))
    best = machine.run(96, finest=1)
    around = load("searching").neighbors(best, 1)
    assert all(split in machine.steps for split in around)
    assert all(machine.seconds(split) >= machine.seconds(best) for split in around)


def test_clearly_worse_splits_cost_two_steps_and_end_the_walk():
    machine = Machine((0.05, 0.15), (0.006, 0.025))
    machine.search.walk([(32, 32), (40, 24), (51, 13), (56, 8), (60, 4), (62, 2)], 3)
    assert machine.steps == {(56, 8): 6, (60, 4): 6, (62, 2): 6, (51, 13): 6, (40, 24): 2}
    assert machine.search.hopeless((40, 24))
    assert machine.search.finalists(2) == [(56, 8), (60, 4)]


def test_large_global_batches_are_searched_in_coarse_steps():
    machine = Machine((0.05, 0.15), (0.006, 0.025))
    best = machine.run(512)
    assert len(machine.steps) < 20
    every = min(machine.seconds((b, 512 - b)) for b in range(2, 511))
    assert machine.seconds(best) < 1.03 * every


def test_a_search_can_go_on_from_one_more_split():
    machine = Machine((0.0, 0.3), (0.006, 0.012))
    machine.search.look_at((32, 32))
    machine.search.look_at((58, 6))
    machine.search.polish(64)
    assert machine.seconds(machine.search.best) <= min(machine.seconds((b, 64 - b)) for b in range(2, 63)) / 0.995
