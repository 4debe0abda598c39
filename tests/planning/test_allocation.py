"""Splits are exact: checked against all splits if these can be enumerated, else against an integer program."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from lightning_hetero.planning.allocation import Curves, allocate, expected_maximum, proportional
from lightning_hetero.planning.step_time import StepTimeModel


def sample_by_sample(models: list[StepTimeModel], global_batch: int, limits: dict) -> tuple[int, ...]:
    """The greedy order, step by step: each to the rank that would finish first with it."""
    step = limits["granularity"]
    split = [-(-least // step) * step for least in limits["minimum"]]
    most = limits.get("maximum", [global_batch] * len(models))
    while sum(split) < global_batch:
        free = (r for r, b in enumerate(split) if b + step <= most[r])
        *_, rank = min((models[r].seconds(split[r] + step), split[r] + step, r) for r in free)
        split[rank] += step
    return tuple(split)


# Few different times, so that ties and flat pieces are common; and any times at all.
points = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([0.5, 1.0, 1.5, 2.0]) | st.floats(1e-6, 1e3)), min_size=1, max_size=5
)
curves = points.map(lambda measured: StepTimeModel.fit(*zip(*measured, strict=True)))


@st.composite
def problems(draw: st.DrawFn, ranks: int, largest: int) -> tuple[list[StepTimeModel], int, dict]:
    """Models, a global batch, and limits that can be met."""
    models = draw(st.lists(curves, min_size=1, max_size=ranks))
    step = draw(st.sampled_from([1, 1, 2, 3]))
    per_rank = draw(
        st.lists(st.tuples(st.integers(0, 4), st.integers(1, largest)), min_size=len(models), max_size=len(models))
    )
    low = [least for least, _ in per_rank]
    high = [least + step + more for least, more in per_rank]
    units = draw(st.integers(sum(-(-v // step) for v in low) or 1, max(sum(v // step for v in high), 1)))
    limits: dict = {"minimum": low, "granularity": step}
    if draw(st.booleans()):
        limits["maximum"] = high
    return models, units * step, limits


def makespan(models: list, local_batches: tuple[int, ...]) -> float:
    """Seconds until the last rank is done; a rank without samples takes no time."""
    return max((m.seconds(b) for m, b in zip(models, local_batches, strict=True) if b), default=0.0)


def assert_within_limits(result: tuple[int, ...], global_batch: int, limits: dict) -> None:
    assert sum(result) == global_batch
    assert all(type(b) is int and b % limits["granularity"] == 0 for b in result)
    assert all(b >= least for b, least in zip(result, limits["minimum"], strict=True))
    assert all(b <= most for b, most in zip(result, limits.get("maximum", result), strict=True))


@given(problems(ranks=3, largest=9))
def test_no_other_split_is_faster(problem: tuple) -> None:
    """All splits within the limits are tried; the rounding of real-valued shares would fail here."""
    models, global_batch, limits = problem
    global_batch = min(global_batch, sum(limits["minimum"]) + 12 * limits["granularity"])
    global_batch -= global_batch % limits["granularity"]
    result = allocate(models, global_batch, **limits)
    assert_within_limits(result, global_batch, limits)
    highest = limits.get("maximum", [global_batch] * len(models))
    choices = [
        [b for b in range(0, global_batch + 1, limits["granularity"]) if least <= b <= most]
        for least, most in zip(limits["minimum"], highest, strict=True)
    ]
    splits = (s for s in itertools.product(*choices) if sum(s) == global_batch)
    assert makespan(models, result) == min(makespan(models, s) for s in splits)


@given(problems(ranks=12, largest=300))
def test_one_bisection_for_all_ranks_gives_the_split_of_the_sample_by_sample_walk(problem: tuple) -> None:
    """Two different algorithms agree on every sample, also among equal times: so all ranks get the same split."""
    models, global_batch, limits = problem
    result = allocate(models, global_batch, **limits)
    assert_within_limits(result, global_batch, limits)
    assert result == sample_by_sample(models, global_batch, limits)


@given(st.lists(curves, min_size=1, max_size=6), st.integers(1, 70))
def test_what_fits_into_a_time_is_exact_to_the_last_bit(models: list[StepTimeModel], local_batch: int) -> None:
    """Inverting a curve in floating point is sometimes off by a sample, so the curve itself is checked."""
    every = Curves([model.packed for model in models])
    low, high = np.zeros(len(models), dtype=np.int64), np.full(len(models), 100)
    for model in models:
        at = model.seconds(local_batch)
        for time in (at, math.nextafter(at, 0.0)):
            expected = [sum(m.seconds(b) <= time for b in range(1, 101)) for m in models]
            assert every.within(time, low, high, 1).tolist() == expected


@pytest.mark.parametrize("seed", range(6))
def test_an_integer_program_finds_nothing_faster(seed: int) -> None:
    """An independent solver, on as many ranks as it can take: fixed costs, costs per sample, limits, granularity."""
    rng = np.random.default_rng(seed)
    world_size, step = 6, int(rng.choice([1, 4]))
    fixed, each = rng.uniform(0, 0.5, world_size), rng.uniform(0.001, 0.05, world_size)
    low, high = rng.integers(1, 9, world_size), rng.integers(40, 120, world_size)
    models = [StepTimeModel((0,), (float(f),), float(e)) for f, e in zip(fixed, each, strict=True)]
    global_batch = 160
    # Unknowns: units of each rank, and the makespan, which is minimized.
    solved = milp(
        np.r_[np.zeros(world_size), 1.0],
        integrality=np.r_[np.ones(world_size), 0],
        bounds=Bounds(np.r_[-(-low // step), 0.0], np.r_[high // step, np.inf]),
        constraints=[
            LinearConstraint(np.r_[np.full(world_size, step), 0.0], global_batch, global_batch),
            LinearConstraint(np.c_[np.diag(each * step), -np.ones(world_size)], -np.inf, -fixed),
        ],
        options={"mip_rel_gap": 0.0},
    )
    result = allocate(models, global_batch, minimum=low.tolist(), maximum=high.tolist(), granularity=step)
    assert makespan(models, result) == pytest.approx(solved.fun, rel=1e-6)


@pytest.mark.parametrize("granularity", [1, 8])
def test_ten_thousand_ranks_are_split_exactly(granularity: int) -> None:
    """The certificate of the optimum: no rank can take another step and still be below the makespan."""
    rng = np.random.default_rng(0)
    models = []
    for _ in range(10_000):
        at = np.sort(rng.choice(np.arange(1, 200), rng.integers(1, 6), replace=False))
        times = (rng.uniform(0.05, 1) + rng.uniform(0.001, 0.03) * at) * rng.uniform(0.95, 1.05, len(at))
        models.append(StepTimeModel.fit(at.tolist(), times.tolist()))
    caps = rng.integers(64, 400, len(models)).tolist()
    result = allocate(models, 640_000, maximum=caps, granularity=granularity)
    assert_within_limits(result, 640_000, {"minimum": [1] * len(models), "maximum": caps, "granularity": granularity})
    # What was given last and what would be given next, by seconds, samples and rank: the order of handing out.
    ranks = range(len(models))
    given_last = max((models[r].seconds(b), b, r) for r, b in zip(ranks, result, strict=True) if b > granularity)
    free = (r for r in ranks if result[r] + granularity <= caps[r])
    given_next = min((models[r].seconds(result[r] + granularity), result[r] + granularity, r) for r in free)
    assert given_last < given_next


def test_equal_devices_get_equal_shares_also_where_they_are_flat() -> None:
    """A flat GPU finishes 1 and 64 samples together; that is no reason to give one of two GPUs everything."""
    flat = StepTimeModel.fit([1, 64, 128], [0.1, 0.1, 0.2])
    assert allocate([flat] * 3, 96) == (32, 32, 32)
    assert allocate([flat] * 3, 97) == (33, 32, 32)
    assert allocate([flat] * 2, 10**9) == (5 * 10**8, 5 * 10**8)


def test_fixed_costs_decide_not_rates() -> None:
    """The measured pair of ranks: 60/4 takes 0.42 s, in proportion to their speeds (51/13) it would take 0.6 s."""
    rank0 = {32: 0.244, 48: 0.342, 52: 0.373, 54: 0.378, 56: 0.384, 58: 0.412, 60: 0.418, 62: 0.439}
    rank1 = {32: 1.138, 16: 0.660, 12: 0.576, 10: 0.517, 8: 0.481, 6: 0.437, 4: 0.355, 2: 0.260}
    models = [StepTimeModel.fit(list(own), list(own.values())) for own in (rank0, rank1)]
    assert allocate(models, 64, granularity=2) == (60, 4)


def test_a_rank_that_does_not_pay_gets_its_minimum() -> None:
    """Its fixed cost alone exceeds the makespan of the others."""
    fast, slow = StepTimeModel((0,), (0.0,), 0.01), StepTimeModel((0,), (5.0,), 0.01)
    assert allocate([fast, slow], 64, minimum=2) == (62, 2)
    assert allocate([fast, slow], 64, minimum=[2, 0]) == (64, 0)


line = StepTimeModel((0,), (0.1,), 0.01)


@pytest.mark.parametrize(
    ("ranks", "global_batch", "limits", "said"),
    [
        (2, 64, {"maximum": [30, 10]}, "^the caps of all ranks add up to 40 samples, 24 short of the global batch 64$"),
        (2, 64, {"maximum": 31, "granularity": 8}, "add up to 48 samples, 16 short of the global batch 64$"),
        (3, 8, {"minimum": 4}, "add up to 12 samples, 4 more than the global batch 8$"),
        (3, 16, {"granularity": 8}, r"multiples of 8, add up to 24 samples, 8 more than the global batch 16$"),
        (2, 65, {"granularity": 8}, "65 is not a multiple of granularity 8: the nearest that are: 64 and 72$"),
        (2, 32, {"minimum": [1, 9], "maximum": [16, 15], "granularity": 8}, "rank 1: no multiple of granularity 8"),
        (0, 16, {}, "at least one rank"),
        (2, 0, {}, "at least 1 sample, got 0"),
        (2, 16, {"granularity": 0}, "granularity must be at least 1, got 0"),
        (2, 16, {"minimum": [1, 1, 1]}, r"minimum must be an int, or one per rank for 2 ranks, got \[1, 1, 1\]"),
        (2, 16, {"maximum": -1}, "maximum must not be negative, got -1"),
        (2, 16, {"maximum": 2.5}, "maximum must be an int"),
    ],
)
def test_what_cannot_be_split_raises_and_says_by_how_much(
    ranks: int, global_batch: int, limits: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        allocate([line] * ranks, global_batch, **limits)


shares = st.lists(st.floats(0, 1e300) | st.integers(0, 9), min_size=1, max_size=9).filter(any)


@given(shares, st.integers(1, 3), st.integers(0, 5), st.integers(0, 500))
def test_shares_are_kept_to_a_step(shares: list[float], step: int, minimum: int, more: int) -> None:
    """Without minimum, each rank is less than one step away from its exact share (the quota rule)."""
    global_batch = (len(shares) * -(-minimum // step) + more + 1) * step
    result = proportional(global_batch, shares, minimum=minimum, granularity=step)
    assert sum(result) == global_batch
    assert min(result) >= minimum
    assert all(b % step == 0 for b in result)
    if minimum == 0:
        scale = max(shares)
        total = math.fsum(share / scale for share in shares)
        for b, share in zip(result, shares, strict=True):
            assert abs(b - global_batch * (share / scale) / total) < step * (1 + 1e-9)


def test_shares_by_example() -> None:
    assert proportional(10, [4, 1]) == (8, 2)
    assert proportional(64, [1, 1, 1]) == (22, 21, 21)
    assert proportional(64, [4, 0]) == (63, 1)
    assert proportional(64, [4, 0], minimum=0) == (64, 0)
    assert proportional(64, [100, 1, 1], minimum=[1, 8, 1]) == (55, 8, 1)
    assert proportional(64, [3, 1], granularity=8) == (48, 16)
    assert proportional(10, [0.1, 0.2, 0.7]) == (1, 2, 7)


def filled(units: int, weights: list[Fraction], least: list[int], most: list[int]) -> list[Fraction]:
    """Exact quotas, in another way: the level at which limits and shares together take all."""
    limits = {Fraction(limit) / w for w, a, b in zip(weights, least, most, strict=True) for limit in (a, b)}

    def at(level: Fraction) -> list[Fraction]:
        return [min(max(level * w, Fraction(a)), Fraction(b)) for w, a, b in zip(weights, least, most, strict=True)]

    below = max(level for level in limits if sum(at(level)) <= units)
    rising = [w for w, x, b, a in zip(weights, at(below), most, least, strict=True) if a <= below * w == x < b]
    return at(below + (units - sum(at(below))) / sum(rising)) if sum(at(below)) < units else at(below)


@given(st.data(), st.integers(1, 6), st.integers(1, 3))
def test_what_a_cap_keeps_from_a_rank_goes_to_the_others_in_proportion(
    data: st.DataObject, world_size: int, step: int
) -> None:
    """Against exact fractions: every rank is less than one step from its quota, and within its limits."""
    weights = data.draw(st.lists(st.integers(1, 9), min_size=world_size, max_size=world_size))
    limits = [sorted(data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20)))) for _ in range(world_size)]
    least, most = [a for a, _ in limits], [b for _, b in limits]
    units = data.draw(st.integers(max(1, sum(least)), max(1, sum(most))))
    if not sum(least) <= units <= sum(most):
        return
    result = proportional(
        units * step, weights, minimum=[a * step for a in least], maximum=[b * step for b in most], granularity=step
    )
    assert sum(result) == units * step
    quotas = filled(units, [Fraction(w) for w in weights], least, most)
    for b, quota, low, high in zip(result, quotas, least, most, strict=True):
        assert b % step == 0
        assert low * step <= b <= high * step
        assert abs(Fraction(b, step) - quota) < 1 + Fraction(1, 10**9)


def test_caps_by_example() -> None:
    assert proportional(10, [4, 1], maximum=[5, 10]) == (5, 5)
    assert proportional(64, [1, 1, 1], maximum=[10, 64, 64]) == (10, 27, 27)
    assert proportional(64, [6, 2, 1], maximum=[10, 64, 64]) == (10, 36, 18)
    assert proportional(64, [4, 0, 0], minimum=0, maximum=[40, 64, 64]) == (40, 12, 12)
    assert proportional(64, [4, 0], maximum=[64, 64]) == (63, 1)
    assert proportional(64, [3, 1], maximum=[40, 64], granularity=8) == (40, 24)
    assert proportional(64, [1, 1], maximum=32) == (32, 32)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"maximum": [30, 10]}, "^the caps of all ranks add up to 40 samples, 24 short of the global batch 64$"),
        ({"minimum": [1, 9], "maximum": [64, 8]}, "rank 1: no multiple of granularity 1"),
        ({"maximum": [1, 2, 3]}, "maximum must be an int, or one per rank for 2 ranks"),
    ],
)
def test_caps_that_do_not_fit_raise(limits: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        proportional(64, [1, 1], **limits)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([1, -1], "share -1 of rank 1 is negative"),
        ([1, math.nan], "share nan of rank 1 is not a finite number"),
        ([math.inf, 1], "share inf of rank 0 is not a finite number"),
        ([0, 0], r"shares \[0, 0\] add up to zero"),
        ([], "at least one rank"),
        ([1] * 9, "add up to 9 samples, 1 more than the global batch 8"),
    ],
)
def test_shares_that_mean_nothing_raise(shares: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        proportional(8, shares)


@given(st.lists(st.tuples(st.floats(0.5, 2), st.floats(0, 0.3)), min_size=1, max_size=16), st.integers(0, 3))
def test_the_expected_maximum_is_that_of_many_draws(ranks: list[tuple[float, float]], seed: int) -> None:
    """Against a simulation of 20,000 steps; its own error is a few thousandths."""
    means, deviations = map(np.array, zip(*ranks, strict=True))
    draws = np.random.default_rng(seed).normal(means, deviations, (20_000, len(means)))
    assert expected_maximum(means, deviations) == pytest.approx(draws.max(axis=1).mean(), abs=0.012)


def test_the_expected_maximum_without_noise_is_the_maximum() -> None:
    assert expected_maximum([0.3, 0.7, 0.1], [0, 0, 0]) == pytest.approx(0.7)
