"""What pays, and from when on: against all companies of ranks and all their splits, and against closed forms."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.planning.efficiency import FARTHEST, MARGIN, Job
from lightning_hetero.planning.step_time import StepTimeModel


def line(fixed: float, each: float) -> StepTimeModel:
    return StepTimeModel((0,), (fixed,), each)


points = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.5, 2.0, 6.0]) | st.floats(0.01, 50)),
    min_size=1,
    max_size=4,
)
fitted = points.map(lambda measured: StepTimeModel.fit(*zip(*measured, strict=True)))
models = fitted | st.builds(line, st.floats(0, 20), st.floats(0.01, 5))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Job, int]:
    """Up to 4 ranks, and a global batch that is enough for all and not too much."""
    own = draw(st.lists(models, min_size=1, max_size=4))
    size, step = len(own), draw(st.sampled_from([1, 1, 2]))
    tails = draw(st.just([]) | st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=size, max_size=size))
    least = draw(st.lists(st.integers(1, 2), min_size=size, max_size=size))
    most = draw(st.none() | st.lists(st.integers(4, 10), min_size=size, max_size=size))
    lower = sum(-(-b // step) for b in least)
    upper = max(lower, min(sum(b // step for b in most) if most else 99, lower + 5))
    return Job(own, tails, least, step, most), step * draw(st.integers(lower, upper))


def step_seconds(job: Job, ranks: tuple[int, ...], split: tuple[int, ...]) -> float:
    tails = job.tails or [0.0] * job.world_size
    return max(
        job.models[r].seconds(b) + (tails[r] if len(ranks) > 1 else 0.0) for r, b in zip(ranks, split, strict=True)
    )


def by_hand(job: Job, ranks: tuple[int, ...], global_batch: int) -> float:
    """The least of all splits."""
    step = job.granularity
    allowed = [
        range(-(-job.minimum[r] // step) * step, min(job.maximum[r] if job.maximum else 99, global_batch) + 1, step)
        for r in ranks
    ]
    splits = (split for split in itertools.product(*allowed) if sum(split) == global_batch)
    return min((step_seconds(job, ranks, split) for split in splits), default=math.inf)


def companies(size: int) -> list[tuple[int, ...]]:
    return [ranks for n in range(1, size + 1) for ranks in itertools.combinations(range(size), n)]


close = pytest.approx


@given(jobs())
def test_every_company_is_as_fast_as_its_best_split(case):
    job, global_batch = case
    for ranks in companies(job.world_size):
        split, seconds = job.best(global_batch, ranks)
        assert seconds == close(by_hand(job, ranks, global_batch), rel=1e-5)
        if split:
            assert sum(split) == global_batch
            assert seconds == close(step_seconds(job, ranks, split))
    everybody = tuple(range(job.world_size))
    split, seconds = job.best(global_batch)
    assert job.step_seconds(split) == close(seconds)
    for rank in everybody if len(everybody) > 1 else ():
        others = tuple(r for r in everybody if r != rank)
        assert job.without(rank, global_batch) == close(by_hand(job, others, global_batch), rel=1e-5)


@given(jobs())
def test_the_fastest_company_is_the_fastest_of_all(case):
    job, global_batch = case
    fastest = job.fastest(global_batch)
    least = min(by_hand(job, ranks, global_batch) for ranks in companies(job.world_size))
    assert fastest.seconds == close(least, rel=1e-5)
    assert fastest.seconds == close(by_hand(job, fastest.ranks, global_batch), rel=1e-5)


@given(jobs())
def test_who_does_not_pay_costs_more_than_the_margin(case):
    job, global_batch = case
    everybody = tuple(range(job.world_size))
    paying = job.paying(global_batch)
    assert paying.ranks
    assert paying.seconds == close(by_hand(job, paying.ranks, global_batch), rel=1e-5)
    fastest = job.fastest(global_batch)
    slack = 1 + 1e-9
    if paying.ranks == everybody:
        assert job.best(global_batch)[1] <= (1 + MARGIN) ** 2 * fastest.seconds * slack
        return
    assert paying.seconds <= (1 + MARGIN) * fastest.seconds * slack
    assert job.best(global_batch)[1] > (1 + MARGIN) * paying.seconds
    for rank in set(everybody) - set(paying.ranks):
        with_it = by_hand(job, tuple(sorted((*paying.ranks, rank))), global_batch)
        assert with_it > fastest.seconds * (1 + MARGIN) / slack, "each of them by itself"


@given(jobs(), st.data())
def test_from_its_global_batch_on_it_pays(case, data):
    job, global_batch = case
    rank = data.draw(st.integers(0, job.world_size - 1))
    first = job.pays_from(rank, global_batch)
    if rank in job.paying(global_batch).ranks:
        assert first == global_batch
    elif first is None:
        largest = min(
            FARTHEST * global_batch, sum(b // job.granularity * job.granularity for b in job.maximum or [9**9])
        )
        assert rank not in job.paying(largest).ranks
    else:
        assert first % job.granularity == 0
        assert global_batch < first <= FARTHEST * global_batch
        assert rank in job.paying(first).ranks
        assert rank not in job.paying(first - job.granularity).ranks


@given(
    st.floats(0, 0.5), st.floats(0.001, 0.1), st.floats(0, 20), st.floats(0.001, 0.1), st.integers(2, 64), st.booleans()
)
def test_two_straight_lines(fixed, each, slow_fixed, slow_each, global_batch, known):
    """Rank 1 pays once rank 0 alone needs as long as rank 1 does for one sample, but for the margin."""
    make = line
    job = Job([make(fixed, each), make(slow_fixed, slow_each)])
    least = slow_fixed + slow_each
    if least < fixed + each:  # it is rank 0 then that may not pay
        return
    first = max(math.ceil((least / (1 + MARGIN) - fixed) / each), global_batch)
    got = job.pays_from(1, global_batch)
    if first > FARTHEST * global_batch + 1:
        assert got is None
    elif got is None:
        assert first >= FARTHEST * global_batch
    else:
        assert abs(got - first) <= 1
    if 1 not in job.paying(global_batch).ranks:
        assert job.paying(global_batch).ranks == (0,)
        assert job.paying(global_batch).seconds == close(fixed + each * global_batch)


def test_the_measured_case():
    """ResNet-18 on quotas of 100 and 25: the fast one alone is faster at 64 samples, and slower at 256."""
    fast = StepTimeModel.fit([32, 48, 56, 60, 62, 64, 256], [0.244, 0.342, 0.384, 0.418, 0.439, 0.401, 1.666])
    slow = StepTimeModel.fit([2, 4, 8, 16, 32], [0.260, 0.355, 0.481, 0.660, 1.138])
    job = Job([fast, slow], [0.01, 0.2])
    assert job.paying(64).ranks == (0,)
    assert 0.40 <= job.paying(64).seconds == job.without(1, 64) <= 0.43
    assert 64 < job.pays_from(1, 64) < 128
    assert job.paying(256).ranks == (0, 1)


def test_alone_there_is_no_communication():
    job = Job([line(0, 1), line(0, 1)], [10.0, 10.0])
    assert job.step_seconds((5, 5)) == 15
    assert job.without(1, 10) == 10
    assert job.paying(10).ranks == (0,)
    assert job.paying(100).ranks == (0, 1)
    assert job.pays_from(1, 10) in (20, 21), "half of it and 10 s against all of it, but for the margin"
    single = Job([line(0, 1)], [10.0])
    assert single.step_seconds((5,)) == 5
    assert single.paying(5).ranks == (0,)
    assert single.fraction_of_limit(5, 5.0) == 1
    with pytest.raises(ValueError, match="only rank"):
        single.without(0, 5)


def test_a_rank_by_itself_is_spared_what_averaging_costs_it():
    """Its own work holds copies into buckets, hooks and gloo's threads: 0.354 s become 0.334."""
    job = Job([line(0.05, 0.0095), line(0.2, 0.05)], [0.02, 0.05], minimum=2, spared=[0.02, 0.03])
    assert job.without(1, 32) == close(0.05 + 0.0095 * 32 - 0.02)
    assert job.paying(32).ranks == (0,)
    assert Job(job.models, job.tails, minimum=2).paying(32).ranks == (0, 1)
    assert job.limit(64) == close(64 / (0.658 - 0.02) + 64 / (3.4 - 0.03))
    assert Job([line(0.1, 0.01)], spared=[0.02]).limit(10) == close(10 / 0.2)


def test_what_is_spared_grows_no_further_with_the_global_batch():
    """A slow rank that brings 7% pays at last, though it does not at 64 samples; never more than half is spared."""
    models = [line(0.05, 0.01), line(0.3, 0.14)]
    job = Job(models, minimum=2, spared=[0.08 * model.seconds(64) for model in models])
    assert job.paying(64).ranks == (0,)
    assert 64 < job.pays_from(1, 64) < 128, "in proportion to the time it would be 400"
    assert Job(models, spared=[9.0, 9.0]).without(1, 10) == close(0.15 / 2)


def test_twins_that_hold_everybody_up_are_left_out_together():
    """Without one of them alone nothing would be gained. The less bad rank comes back first."""
    job = Job([line(0.1, 0.01), line(0.1, 0.01), line(3, 0.1), line(3, 0.1), line(9, 0.1)])
    assert job.without(2, 40) == job.best(40)[1]
    assert job.paying(40).ranks == (0, 1)
    assert job.pays_from(2, 40) == job.pays_from(3, 40) < job.pays_from(4, 40)


def test_never_everybody_and_never_is_none():
    job = Job([line(1, 0.0001), line(1000, 1)])
    assert job.paying(64).ranks == (0,)
    assert job.pays_from(1, 64) is None
    assert job.pays_from(0, 64) == 64
    same = Job([line(5, 0), line(5, 0)])
    assert same.paying(2).ranks == (0, 1), "no harm in taking part"


def test_who_is_needed_for_room_pays():
    job = Job([line(0, 0.01), line(100, 1)], maximum=[60, 60])
    assert job.paying(60).ranks == (0,)
    assert job.paying(61).ranks == (0, 1)
    assert job.pays_from(1, 60) == 61
    assert job.best(121) == ((), math.inf)


@given(jobs())
def test_limit_and_gain(case):
    job, global_batch = case
    limit = sum(global_batch / m.seconds(global_batch) for m in job.models)
    assert job.limit(global_batch) == close(limit)
    assert job.fraction_of_limit(global_batch, 2.0) == close(global_batch / 2 / limit)
    if job.maximum is None:
        split, _ = job.best(global_batch)
        assert job.gain_over_equal(job.equal(global_batch)) == 1
        assert job.gain_over_equal(split) >= 1 - 1e-5


def test_perfect_scaling_reaches_the_limit():
    job = Job([line(0, 0.01), line(0, 0.04)])
    assert job.best(100) == ((80, 20), close(0.8))
    assert job.fraction_of_limit(100, 0.8) == close(1)
    assert job.gain_over_equal((80, 20)) == close(2.5)


def test_many_ranks_are_quick():
    """Bisection over who takes part: a few allocations, not one for each of 3000 ranks."""
    job = Job([line(0.01 + i / 1000, 0.001) for i in range(3000)])
    assert len(job.paying(6000).ranks) < 300


@pytest.mark.parametrize(
    "options",
    [
        {"tails": [1.0]},
        {"tails": [-1.0, 0]},
        {"minimum": 0},
        {"maximum": [1]},
        {"granularity": 0},
        {"spared": [1.0]},
    ],
)
def test_what_is_no_job(options):
    with pytest.raises(ValueError, match="tails"):
        Job([line(0, 1), line(0, 1)], **options)
