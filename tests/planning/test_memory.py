"""Models of peak memory never predict too little, and caps follow from them alike on all ranks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.memory import UNLIMITED, Caps, MemoryLimits, MemoryModel
from tests.planning.stepping import memory_reports

GIB = 2.0**30
peaks = st.dictionaries(st.integers(1, 500), st.floats(0, 1e12), min_size=1, max_size=8)


@given(peaks, st.floats(0, 1e12))
def test_what_was_observed_is_never_under_predicted(observed: dict[int, float], resting: float) -> None:
    model = MemoryModel.fit(observed, resting)
    assert model.fixed >= 0
    assert model.per_sample >= 0
    for local_batch, peak in observed.items():
        assert model.bytes(local_batch) >= peak * (1 - 1e-12)


@given(peaks, st.floats(0, 1e13))
def test_the_largest_local_batch_is_the_last_within_the_limit(observed: dict[int, float], limit: float) -> None:
    model = MemoryModel.fit(observed)
    largest = model.largest(limit)
    if 0 < largest < UNLIMITED:
        assert model.bytes(largest) <= limit
        assert model.bytes(largest + 1) > limit * (1 - 1e-12)
    if largest == 0 and model.fixed <= limit:
        assert model.bytes(1) > limit * (1 - 1e-12)


@given(st.floats(1, 1e10), st.floats(1, 1e8), st.lists(st.integers(1, 300), min_size=2, max_size=6, unique=True))
def test_a_line_is_found_again(fixed: float, per_sample: float, local_batches: list[int]) -> None:
    model = MemoryModel.fit({b: fixed + per_sample * b for b in local_batches})
    assert math.isclose(model.bytes(1000), fixed + per_sample * 1000, rel_tol=1e-6)


def test_with_one_local_batch_all_bytes_beyond_the_resting_ones_are_the_samples() -> None:
    assert MemoryModel.fit({10: 30.0}) == MemoryModel(0.0, 3.0)
    assert MemoryModel.fit({10: 30.0}, resting=20.0) == MemoryModel(20.0, 1.0)
    assert MemoryModel.fit({10: 30.0}, resting=50.0) == MemoryModel(30.0, 0.0)
    assert MemoryModel.fit({10: 30.0}, resting=20.0).largest(100.0) == 80


@pytest.mark.parametrize("observed", [{}, {0: 1.0}, {2: -1.0}, {2: math.nan}])
def test_what_can_not_have_been_measured_raises(observed: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"measured|at least one"):
        MemoryModel.fit(observed)


def caps(limits: list[float], global_batch: int = 64, minimum: int = 1, granularity: int = 1) -> Caps:
    devices = tuple(f"device {rank}" for rank in range(len(limits)))
    return Caps(MemoryLimits(tuple(limits), devices), global_batch, minimum=minimum, granularity=granularity)


def test_before_anything_is_known_nothing_is_capped() -> None:
    fresh = caps([GIB, GIB])
    assert fresh.update(memory_reports((0,), (0,))) == ()
    assert min(fresh.maximum([32, 32])) >= 64


def test_with_one_point_a_rank_goes_no_further_than_twice_and_never_beyond_the_limit() -> None:
    """Rank 0 has memory for 10 times as much, rank 1 for 1.5 times."""
    known = caps([10 * GIB, 1.5 * GIB])
    known.update(memory_reports((32, GIB, 0.0, 0), (32, GIB, 0.0, 0)))
    assert known.maximum([32, 32]) == (64, 48)


def test_with_two_points_the_line_decides() -> None:
    known = caps([10 * GIB, math.inf])
    known.update(memory_reports((10, 2 * GIB, 0.0, 0), (54, GIB, 0.0, 0)))
    known.update(memory_reports((20, 3 * GIB, 0.0, 0), (44, GIB, 0.0, 0)))
    assert known.maximum([20, 44])[0] == 90


def test_the_growth_limit_gives_way_where_the_global_batch_needs_it_but_memory_does_not() -> None:
    """Rank 0 is over its limit, and rank 1 has never had more than 2: twice that would not do."""
    known = caps([GIB, 64 * GIB])
    known.update(memory_reports((62, 2 * GIB, 0.0, 0), (2, GIB, 0.0, 0)))
    first, second = known.maximum([62, 2])
    assert first == 31
    assert 33 <= second <= 128


def test_what_has_run_within_the_limit_may_run_again() -> None:
    """The line through noisy points lies above the largest of them."""
    known = caps([3 * GIB, math.inf])
    known.update(memory_reports((10, 2.2 * GIB, 0.0, 0), (1, 0.0, 0.0, 0)))
    known.update(memory_reports((20, 2.3 * GIB, 0.0, 0), (1, 0.0, 0.0, 0)))
    known.update(memory_reports((30, 3.0 * GIB, 0.0, 0), (1, 0.0, 0.0, 0)))
    assert MemoryModel.fit({10: 2.2, 20: 2.3, 30: 3.0}).largest(3.0) < 30
    assert known.maximum([30, 34])[0] == 30


def test_a_rank_that_ran_out_is_capped_and_reported_once() -> None:
    known = caps([10 * GIB, 10 * GIB])
    warnings = known.update(memory_reports((32, GIB, 0.0, 0), (0, 0.0, 0.0, 16)))
    assert len(warnings) == 1
    assert "rank 1 (device 1) ran out of memory" in warnings[0]
    assert "at most 16 samples" in warnings[0]
    assert known.update(memory_reports((32, GIB, 0.0, 0), (0, 0.0, 0.0, 16))) == ()
    assert known.maximum([32, 32])[1] == 16


@pytest.mark.parametrize(
    ("limits", "reports", "options", "sentences"),
    [
        (
            [GIB, GIB],
            [(32, 2 * GIB)] * 2,
            {},
            [
                "a global batch of 64 does not fit",
                "32 samples too many",
                "16 on rank 0 (device 0, 1.00 GiB)",
                "at most 32",
            ],
        ),
        (
            [math.inf, math.inf],
            [(0, 0.0, 0.0, 20), (0, 0.0, 0.0, 30)],
            {},
            ["14 samples too many", "20 on rank 0 (device 0), 30 on rank 1 (device 1)", "at most 50"],
        ),
        (
            [math.inf, math.inf],
            [(0, 0.0, 0.0, 20), (0, 0.0, 0.0, 30)],
            {"granularity": 8},
            ["24 samples too many", "at most 40"],
        ),
        (
            [GIB, 0.5 * GIB],
            [(32, 0.9 * GIB, 0.8 * GIB)] * 2,
            {},
            ["the memory of rank 1 does not hold the smallest local batch, 1"],
        ),
    ],
)
def test_a_global_batch_that_fits_nowhere_says_by_how_much(limits, reports, options, sentences) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentences are compared below
        caps(limits, **options).update(memory_reports(*reports))
    for sentence in sentences:
        assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def halving(capacity: int, local_batch: int) -> tuple[int, int]:
    """What a rank with memory for `capacity` samples finds by halving its batch: largest that fits, smallest not."""
    fails = part = local_batch
    while part > capacity:
        fails, part = part, -(-part // 2)
    return part, fails


@pytest.mark.parametrize(
    ("capacities", "granularity"),
    [
        *(((5, 7), 1), ((7, 5), 1), ((3, 9), 1), ((11, 1), 1), ((6, 6), 2), ((4, 4, 4), 1), ((31, 33), 1)),
        *(((10, 14), 2), ((8, 24, 8), 4), ((50, 50), 1)),
    ],
)
def test_what_fits_is_found_however_the_first_tries_were_cut(capacities, granularity) -> None:
    """Halves that fit don't prove that more would not: 6 is cut into 3 and 3 when 5 would have fitted."""
    total = sum(capacities)
    known = caps([math.inf] * len(capacities), total, granularity=granularity, minimum=granularity)
    split = proportional(total, [1.0] * len(capacities), granularity=granularity)
    facts = dict.fromkeys(range(len(capacities)), (0, 0))  # fits, fails
    for _ in range(12):
        reports = []
        for rank, (local_batch, capacity) in enumerate(zip(split, capacities, strict=True)):
            fits, fails = facts[rank]
            if local_batch > capacity:
                part, failed = halving(capacity, local_batch)
                facts[rank] = max(fits, part), min(fails or failed, failed)
                reports.append((0, 0.0, 0.0, *facts[rank]))
            else:
                facts[rank] = max(fits, local_batch) if fits else 0, fails
                reports.append((local_batch, 0.0, 0.0, *facts[rank]))
        known.update(memory_reports(*reports))
        split = proportional(total, split, minimum=granularity, maximum=known.maximum(split), granularity=granularity)
    assert all(local_batch <= capacity for local_batch, capacity in zip(split, capacities, strict=True))


def test_what_can_not_fit_is_still_an_error_and_says_what_may() -> None:
    known = caps([math.inf] * 2, 64)
    with pytest.raises(ValueError, match=r"32 samples too many .* at most 32 \(or perhaps up to 62\)"):
        known.update(memory_reports(*[(0, 0.0, 0.0, 16, 32)] * 2))


def test_one_peak_within_the_limit_is_no_proof_that_twice_as_much_is_too_much() -> None:
    """8 of its 12 GiB are the optimizer's, which one point can't distinguish from those of 32 samples."""
    known = caps([21.6 * GIB, math.inf], 64)
    known.update(memory_reports((32, 20 * GIB, 8 * GIB, 0), (0, 0.0, 0.0, 16, 32)))
    first, second = known.maximum([32, 32])
    assert first + second == 64
    assert 16 <= second < 32, "some of what is missing may fit there too"
    assert not known.fits_in_memory([first, second])


@given(
    st.data(),
    st.integers(1, 5),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 60),
)
def test_caps_leave_a_split_of_the_global_batch_and_keep_to_memory(
    data, world_size, minimum, granularity, more
) -> None:
    least = -(-minimum // granularity) * granularity
    total = world_size * least + more * granularity
    known = caps([10.0] * world_size, total, minimum=least, granularity=granularity)
    few = st.integers(0, 40)
    report = st.tuples(few, st.floats(0, 12), st.floats(0, 5), few, st.integers(0, 80))
    for _ in range(3):
        reports = [data.draw(report) for _ in range(world_size)]
        try:
            known.update(memory_reports(*reports))
        except ValueError:
            return
        maximum = known.maximum([least] * world_size)
        assert sum(maximum) >= total
        assert all(cap % granularity == 0 and cap >= least for cap in maximum)
        for cap, (*_, fits, fails) in zip(maximum, reports, strict=True):
            assert not fits or cap < max(fails, fits + 1)


def test_a_little_more_than_before_is_known_to_fit_where_the_model_says_so() -> None:
    """One peak gives no slope; a jump, or a local batch beyond the limit, is not known to fit."""
    known = caps([10_000.0, 10_000.0])
    assert not known.fits_in_memory((1, 1)), "nothing is known"
    known.update(memory_reports((32, 3200.0, 0.0, 0), (32, 3200.0, 0.0, 0)))
    assert known.fits_in_memory((32, 32))
    assert not known.fits_in_memory((33, 31)), "no slope yet"
    known.update(memory_reports((50, 5000.0, 0.0, 0), (14, 1400.0, 0.0, 0)))
    assert known.fits_in_memory((55, 9))
    assert not known.fits_in_memory((56, 8)), "more than a tenth"
    known.update(memory_reports((95, 9500.0, 0.0, 0), (32, 3200.0, 0.0, 0)))
    assert known.fits_in_memory((100, 9))
    assert not known.fits_in_memory((101, 9)), "beyond the limit"


def memory_of(model: MemoryModel, limits: list[float], tried: list[list[int]]) -> Caps:
    """Equal ranks that have completed these splits."""
    known = caps(limits, sum(tried[0]))
    for split in tried:
        known.update(memory_reports(*((b, model.bytes(b), model.fixed) for b in split)))
    return known


@given(
    st.floats(0, 100),
    st.floats(0.1, 10),
    st.integers(2, 40),
    st.lists(st.floats(1, 4), min_size=2, max_size=2),
    st.lists(st.floats(0, 3), min_size=2, max_size=2),
)
def test_more_memory_never_allows_less(fixed, per_sample, each, factors, more) -> None:
    """As far as what is known to fit is enough for the global batch."""
    model = MemoryModel(fixed, per_sample)
    tried = [[each, each], [each + 1, each - 1]]
    small = [factor * model.bytes(each + 1) for factor in factors]
    large = [limit * (1 + extra) for limit, extra in zip(small, more, strict=True)]
    before, after = memory_of(model, small, tried), memory_of(model, large, tried)
    assert all(a <= b for a, b in zip(before.allowed, after.allowed, strict=True))
    assert not before.fits_in_memory((each, each)) or after.fits_in_memory((each, each))
