"""What a rank reports of its memory: laws of a device with some limit, and one whose limit moves."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.step.memory_use import MemoryReport, MemoryUse
from lightning_hetero.step.out_of_memory import MemoryBounds


class Peaks:
    """Peaks of a process with 100 bytes at rest and 10 a sample."""

    resting = 100.0

    def __init__(self) -> None:
        self.started: list[int] = []

    def start(self, local_batch: int) -> None:
        self.started.append(local_batch)

    def of_step(self, local_batch: int) -> float:
        assert local_batch == self.started[-1]
        return self.resting + 10 * local_batch


def memory_of(rank: int = 0, world_size: int = 1) -> MemoryUse:
    return MemoryUse(Peaks(), rank, world_size)  # type: ignore[arg-type]


def step(memory: MemoryUse, local_batch: int, found: MemoryBounds | None = None) -> MemoryReport:
    """One step of the only rank, and what its next message says."""
    memory.start(local_batch)
    memory.end(local_batch, found)
    memory.update([memory.report.local_batch])
    return memory.report


def test_steps_in_one_piece() -> None:
    memory = memory_of()
    assert memory.report == MemoryReport(0, 0.0, 100.0, 0, 0)
    assert step(memory, 8) == MemoryReport(8, 180.0, 100.0, 0, 0)
    assert step(memory, 2) == MemoryReport(2, 120.0, 100.0, 0, 0)
    assert not memory.is_too_large(10**9), "memory has never run out"


def test_a_step_in_parts_reports_no_peak() -> None:
    memory = memory_of()
    assert step(memory, 8, MemoryBounds(fits=4, fails=8)) == MemoryReport(0, 0.0, 100.0, 4, 8)
    assert step(memory, 8, MemoryBounds(fits=4, fails=None)) == MemoryReport(0, 0.0, 100.0, 4, 8)


def test_borrowed_samples_are_no_measure() -> None:
    """They are other ranks' and may be more than this rank ever gets."""
    memory = memory_of()
    assert step(memory, 0) == MemoryReport(0, 0.0, 100.0, 0, 0)
    memory.end(0, MemoryBounds(fits=1, fails=2))
    assert memory.report == MemoryReport(0, 0.0, 100.0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8), st.tuples(*[st.integers(0, 9)] * 2))
def test_a_split_is_new_where_any_rank_gets_more_than_it_has_ever_done(
    done: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    memory = memory_of(1, 2)
    for local_batches in done:
        memory.update(local_batches)
    known = [max((split[rank] for split in done), default=0) for rank in range(2)]
    assert memory.exceeds_completed(asked) == (asked[0] > known[0] or asked[1] > known[1])


STEPS = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1)


@given(st.integers(1, 40), STEPS)
def test_of_a_device_with_a_limit_the_truth_lies_between_what_fits_and_what_fails(
    limit: int, steps: list[tuple[int, float, float, bool]]
) -> None:
    """Whatever the sizes of the parts, and whether memory ran out or was known to; and bounds only become tighter.

    Args:
        limit: samples that fit.
        steps: local batches; where in between the parts were that fit and that failed; whether it was tried anew.
    """
    memory = memory_of()
    reports: list[MemoryReport] = []
    largest = 0  # that was computed in one piece
    for local_batch, low, high, tried in steps:
        found = None
        if local_batch > limit:
            fails = limit + 1 + int(high * (local_batch - limit - 1))
            anew = tried or not memory.is_too_large(local_batch)
            found = MemoryBounds(fits=1 + int(low * (limit - 1)), fails=fails if anew else None)
        reports.append(step(memory, local_batch, found))
        largest = max(largest, local_batch if found is None else 0)
        assert reports[-1].fits >= largest or not reports[-1].fails, "what was computed is known to fit"
    for report in reports:
        if report.fails:
            assert report.fits <= limit < report.fails
        else:
            assert report.fits == 0
    known = [report for report in reports if report.fails]
    for before, after in pairwise(known):
        assert before.fits <= after.fits <= after.fails <= before.fails
    if known:
        last = known[-1]
        assert not memory.is_too_large(last.fails - 1)
        assert memory.is_too_large(last.fails)
    assert not memory.exceeds_completed([largest])
    assert memory.exceeds_completed([largest + 1])


@pytest.mark.parametrize(("fits", "fails"), [(4, 8), (1, 2)])
def test_a_limit_that_has_moved_below_what_once_fitted_is_the_new_one(fits: int, fails: int) -> None:
    """Another process uses memory, or samples are larger: then an earlier success proves nothing."""
    memory = memory_of()
    step(memory, 16)
    report = step(memory, 16, MemoryBounds(fits=fits, fails=fails))
    assert (report.fits, report.fails) == (fits, fails)


def test_a_limit_that_has_moved_up_is_found_by_what_was_computed() -> None:
    memory = memory_of()
    step(memory, 8, MemoryBounds(fits=4, fails=8))
    assert step(memory, 12) == MemoryReport(12, 220.0, 100.0, 12, 13)
