"""Measurements of ranks are joined by step, whenever each rank reports them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.planning.reports import MeasuredStep, MeasurementJoin
from tests.planning.stepping import step_reports

SCHEDULE = Schedule(Plan(0, (5, 3)))
SCHEDULE.append(Plan(4, (6, 2)))


def test_a_step_is_complete_once_every_rank_has_reported_it() -> None:
    join = MeasurementJoin(2)
    assert join.add(step_reports(3, [2, -1], [0.5, 0.0]), SCHEDULE) == ()
    assert join.add(step_reports(4, [3, 2], [0.6, 0.7], sync=[0.1, 0.2]), SCHEDULE) == (
        MeasuredStep(2, (5, 3), (0.5, 0.7), (0.0, 0.2)),
    )
    assert join.add(step_reports(5, [4, 3], [0.1, 0.9]), SCHEDULE)[0].compute_seconds == (0.6, 0.9)
    (last,) = join.add(step_reports(6, [-1, 4], [0.0, 0.4]), SCHEDULE)
    assert last.local_batches == (6, 2), "the split that the step ran with"


def test_one_rank_that_averaged_after_its_backward_pass_is_enough() -> None:
    (measured,) = MeasurementJoin(2).add(step_reports(1, [0, 0], [1, 1], after_backward=[False, True]), SCHEDULE)
    assert measured.averaged_after_backward is True
    assert all(type(value) is float for value in measured.compute_seconds), "plain numbers, for JSON"


@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.integers(0, 1000))
def test_every_step_is_joined_once_however_late_ranks_are(delays: list[int], seed: int) -> None:
    ranks, steps = len(delays), 60
    schedule, join = Schedule(Plan(0, (1,) * ranks)), MeasurementJoin(ranks)
    seconds = np.random.default_rng(seed).uniform(1, 2, (steps, ranks))
    joined = []
    for step in range(steps):
        own = [max(step - delay, -1) for delay in delays]
        times = [seconds[at, rank] if at >= 0 else 0.0 for rank, at in enumerate(own)]
        joined += join.add(step_reports(step, own, times), schedule)
    assert [measured.step for measured in joined] == list(range(steps - max(delays)))
    assert all(measured.compute_seconds == tuple(seconds[measured.step]) for measured in joined)


@pytest.mark.parametrize(("late", "complete"), [(MeasurementJoin.KEPT_STEPS, 1), (MeasurementJoin.KEPT_STEPS + 1, 0)])
def test_what_a_rank_does_not_report_in_time_is_given_up(late: int, complete: int) -> None:
    """Memory stays bounded where a rank never measures anything."""
    join = MeasurementJoin(2)
    join.add(step_reports(1, [0, -1], [1, 0]), SCHEDULE)
    join.add(step_reports(2, [late, -1], [1, 0]), SCHEDULE)
    assert len(join.add(step_reports(3, [-1, 0], [0, 1]), SCHEDULE)) == complete
