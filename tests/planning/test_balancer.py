"""The balancer against simulated devices whose best split is known, with noise, lags, outliers and changes of speed."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hetero.planning import balancer as balancing
from lightning_hetero.planning.allocation import allocate, proportional
from lightning_hetero.planning.balancer import Balancer
from lightning_hetero.planning.measurements import KEPT, KEPT_LOCAL_BATCHES
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.reports import MeasuredStep
from lightning_hetero.planning.step_time import StepTimeModel

Curve = Callable[[float], float]

# Compute seconds of two one-thread CPU ranks at 100% and 25% quota (ResNet-18, 64x64 pixels), by local batch.
RANK_0 = {32: 0.244, 48: 0.342, 52: 0.373, 54: 0.378, 56: 0.384, 58: 0.412, 60: 0.418, 62: 0.439}
RANK_1 = {32: 1.138, 16: 0.660, 12: 0.576, 10: 0.517, 8: 0.481, 6: 0.437, 4: 0.355, 2: 0.260}
BEST_MEASURED = 0.418  # at 60/4


def measured(points: dict[int, float]) -> Curve:
    at = sorted(points)
    return lambda b: float(np.interp(b, at, [points[x] for x in at]) + 0.007 * max(b - at[-1], 0))


def affine_devices(world_size: int, rng: np.random.Generator) -> list[Curve]:
    """Devices up to six times as fast as each other, with fixed costs of 2 to 40 samples."""
    speeds, fixed = rng.uniform(1, 6, world_size), rng.uniform(2, 40, world_size)
    return [lambda b, s=s, f=f: 0.01 * (f + b) / s for s, f in zip(speeds, fixed, strict=True)]


def gpu_like_devices(world_size: int, rng: np.random.Generator) -> list[Curve]:
    """Devices that take as long for one sample as for their first 4 to 40."""
    speeds, flat = rng.uniform(1, 6, world_size), rng.integers(4, 41, world_size)
    return [lambda b, s=s, f=f: 0.005 + 0.01 * max(b, f) / s for s, f in zip(speeds, flat, strict=True)]


def best_makespan(curves: Sequence[Curve], global_batch: int) -> float:
    batches = range(1, global_batch + 1)
    split = allocate([StepTimeModel.fit(batches, list(map(curve, batches))) for curve in curves], global_batch)
    return max(curve(b) for curve, b in zip(curves, split, strict=True))


def observe(
    balancer: Balancer,
    step: int,
    split: tuple[int, ...],
    seconds: Sequence[float],
    sync: Sequence[float] = (),
    *,
    after_backward: bool = False,
) -> None:
    """Record a measured step; without sync seconds they are unknown."""
    sync = tuple(sync) or (0.0,) * len(seconds)
    balancer.observe(MeasuredStep(step, split, tuple(seconds), sync, after_backward))


@dataclass
class Run:
    """Simulated training: a step's measurements are known during the next one, a plan starts after what was drawn."""

    curves: list[Curve]
    global_batch: int
    noise: float
    seed: int
    outliers: dict[int, float] = field(default_factory=dict)  # by step: the factor on a rank of its own
    ahead: int = 0  # batches that loaders have drawn beyond the next one
    changes: list[tuple[int, Plan]] = field(default_factory=list)
    makespans: list[float] = field(default_factory=list)  # by step, without noise

    def __post_init__(self) -> None:
        world_size = len(self.curves)
        self.rng = np.random.default_rng(self.seed)
        self.balancer = Balancer(world_size, self.global_batch)
        self.plans = [(0, proportional(self.global_batch, [1] * world_size))]
        self.late: list[tuple[int, tuple[int, ...], list[float]]] = []

    def steps(self, number: int) -> "Run":
        for step in range(len(self.makespans), len(self.makespans) + number):
            plan = next(plan for first, plan in reversed(self.plans) if first <= step)
            own = np.array([curve(b) for curve, b in zip(self.curves, plan, strict=True)])
            self.makespans.append(own.max())
            own *= self.rng.lognormal(0, self.noise, len(own))
            if step == 0:
                own *= 10  # lazy initialization
            if step == 1:
                own *= self.rng.uniform(1, 1.3, len(own))
            if step in self.outliers:
                own[step % len(own)] *= self.outliers[step]
            self.late.append((step, plan, own.tolist()))
            if len(self.late) > 1:
                observe(self.balancer, *self.late.pop(0))
                if (proposal := self.balancer.propose(self.plans[-1][1])) is not None:
                    self.plans.append((step + 1 + self.ahead, proposal.local_batches))
                    self.changes.append((step, proposal))
        return self


def test_two_opposite_changes_of_a_cost_per_sample_are_followed() -> None:
    """Ranks swap speeds, and then are equal. What was scaled at the first change is wrong: fixed costs did not change.

    Kept as if it had been measured, it holds the plan at 13/51, a third above the best.
    """

    def line(each: float) -> Curve:
        return lambda b: 0.013 + each * b

    for seed in range(6):
        run = Run([line(0.0005), line(0.002)], 64, 0.02, seed, ahead=5).steps(60)
        run.curves = [line(0.002), line(0.0005)]
        run.steps(60)
        run.curves = [line(0.0005), line(0.0005)]
        run.steps(90)
        assert run.makespans[-1] <= 1.1 * (0.013 + 0.0005 * 32)


def slowed(curve: Curve, factor: float) -> Curve:
    return lambda b: factor * curve(b)


@pytest.mark.parametrize("noise", [0.03, 0.05])
def test_the_measured_pair_of_ranks_is_balanced_within_ten_steps_and_then_left_alone(noise: float) -> None:
    """From 1.14 s a step to within 5% of the best measured split; afterwards at most one correction in 300 steps.

    Waiting for two measurements more in each stage, or re-solving on noise, fails here.
    """
    corrections = []
    for seed in range(12):
        run = Run([measured(RANK_0), measured(RANK_1)], 64, noise, seed).steps(310)
        assert run.makespans[10] <= 1.055 * BEST_MEASURED  # 62/2, the best one's neighbor, is 1.0502
        assert np.mean(run.makespans[10:]) <= 1.05 * BEST_MEASURED
        corrections.append(sum(step >= 10 for step, _ in run.changes))
    assert max(corrections) <= 2
    assert sum(number > 1 for number in corrections) <= 1


@pytest.mark.parametrize("devices", [affine_devices, gpu_like_devices])
@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_devices_of_any_speed_are_balanced_within_ten_steps(world_size: int, devices: Callable) -> None:
    """Within 5% of the best in nearly all runs, and never far off; then the plan is left alone."""
    ratios, corrections = [], []
    for seed in range(10):
        curves = devices(world_size, np.random.default_rng(100 + seed))
        run = Run(curves, 32 * world_size, 0.03, seed).steps(130)
        best = best_makespan(curves, 32 * world_size)
        ratios.append(run.makespans[10] / best)
        assert np.mean(run.makespans[12:]) <= 1.05 * best
        corrections.append(sum(step >= 10 for step, _ in run.changes))
    assert sum(ratio <= 1.05 for ratio in ratios) >= 9
    assert max(ratios) <= 1.1
    assert max(corrections) <= 3  # what was measured a few times only is doubted once, see below
    assert np.mean(corrections) <= 1


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_changes_speed_is_followed_within_twenty_steps(rank: int, factor: float) -> None:
    """Without scaling the older points, the model mixes two devices, and the plan stops half-way."""
    for seed in range(8):
        run = Run([measured(RANK_0), measured(RANK_1)], 64, 0.04, seed).steps(100)
        run.curves[rank] = slowed(run.curves[rank], factor)
        best = best_makespan(run.curves, 64)
        run.steps(40)
        assert max(run.makespans[120:]) <= 1.06 * best
        assert sum(step >= 100 for step, _ in run.changes) <= 4
        assert "drift" in {proposal.reason for step, proposal in run.changes if step >= 100}


def test_a_change_is_followed_where_other_local_batches_were_only_passed_through() -> None:
    """A probe leads past them, and their one step was a first one, which is slow: they look worse than they are.

    If a gain has to exceed the noise after a drift too, the plan of before stays: nothing new is measured under it.
    """
    speeds = []
    for seed in range(8):
        rank_0, rank_1 = measured(RANK_0), measured(RANK_1)
        run = Run([rank_0, rank_1], 64, 0.1, seed)
        run.plans = [(0, (47, 17))]
        counts: list[dict[float, int]] = [{}, {}]

        def curve(rank: int, b: float, calm: list[Curve], counts: list[dict[float, int]] = counts) -> float:
            counts[rank][b] = counts[rank].get(b, 0) + 1
            return calm[rank](b) * {1: 1.4, 2: 1.15}.get(counts[rank][b], 1.0)

        for factor, steps in ((1.0, 60), (0.42, 60)):
            calm = [rank_0, slowed(rank_1, factor)]
            run.curves = [lambda b, rank=rank, calm=calm, curve=curve: curve(rank, b, calm) for rank in range(2)]
            run.steps(steps)
        speeds.append(best_makespan(calm, 64) / np.mean(run.makespans[75:120]))
    assert np.median(speeds) >= 0.93
    assert min(speeds) >= 0.88


def test_one_of_eight_ranks_that_changes_speed_is_followed() -> None:
    for seed, factor in enumerate([2.0, 0.5, 2.0, 0.5]):
        run = Run(affine_devices(8, np.random.default_rng(seed)), 256, 0.03, seed).steps(100)
        run.curves[seed] = slowed(run.curves[seed], factor)
        run.steps(40)
        assert np.mean(run.makespans[120:]) <= 1.06 * best_makespan(run.curves, 256)


def test_equal_devices_keep_the_equal_split() -> None:
    """No tax where there is nothing to balance: noise of 5% on two early steps is no reason to explore."""
    for seed in range(10):
        assert not Run([lambda b: 0.1 + 0.01 * b] * 4, 128, 0.05, seed).steps(100).changes


def test_single_disturbed_steps_change_nothing() -> None:
    """A pause of the garbage collector, a checkpoint: ten times the time, now and then, on any rank."""
    outliers = dict.fromkeys(range(40, 240, 7), 10.0) | dict.fromkeys(range(43, 240, 35), 0.1)
    for seed in range(8):
        calm = Run([measured(RANK_0), measured(RANK_1)], 64, 0.01, seed).steps(240)
        disturbed = Run([measured(RANK_0), measured(RANK_1)], 64, 0.01, seed, outliers).steps(240)
        assert [plan for _, plan in disturbed.plans] == [plan for _, plan in calm.plans]


def test_the_first_step_of_a_process_is_not_a_measurement() -> None:
    """Also not in a run that starts with a profile: lazy initialization takes place again."""
    balancer = Balancer(2, 8)
    observe(balancer, 0, (4, 4), [100.0, 1.0])
    assert balancer.models() is None
    observe(balancer, 1, (4, 4), [1.0, 2.0])
    assert [seconds_at(balancer, rank, 4) for rank in range(2)] == pytest.approx([1.0, 2.0])

    later = Balancer(2, 8, state=balancer.state_dict())
    observe(later, 2, (4, 4), [100.0, 1.0])
    assert [seconds_at(later, rank, 4) for rank in range(2)] == pytest.approx([1.0, 2.0])


def test_the_first_step_moves_shares_where_ranks_are_very_unequal() -> None:
    """It is not a measurement, but further steps with an equal split would cost more than a wrong guess."""
    balancer = Balancer(2, 64)
    assert balancer.propose((32, 32)) is None
    observe(balancer, 0, (32, 32), [0.5, 3.0])
    first = balancer.propose((32, 32))
    assert first is not None
    assert first.reason == "explore"
    assert 32 < first.local_batches[0] < 55, "towards the proportional split, 55/9, but not all the way"
    assert balancer.models() is None, "nothing of it is kept as a measurement"
    assert balancer.propose(first.local_batches) is None, "given once"


def test_the_first_step_says_nothing_where_ranks_are_nearly_equal() -> None:
    """Lazy initialization alone makes one rank look somewhat slower than another."""
    balancer = Balancer(2, 64)
    observe(balancer, 0, (32, 32), [0.5, 0.7])
    assert balancer.propose((32, 32)) is None


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=16),
    st.integers(0, 60),
    st.sampled_from([1, 4]),
)
def test_a_speed_test_moves_shares_towards_the_fast_and_never_beyond_twice_an_equal_share(
    speeds, more, granularity
) -> None:
    world_size = len(speeds)
    global_batch = granularity * (world_size + more)
    equal = proportional(global_batch, [1] * world_size, granularity=granularity)
    split = Balancer(world_size, global_batch, granularity=granularity).split_from_speeds(speeds, equal)
    assert sum(split) == global_batch
    assert all(granularity <= b <= 2 * most and b % granularity == 0 for b, most in zip(split, equal, strict=True))
    if max(speeds) < 1.5 * min(speeds):
        assert split == equal, "so small a difference is the machine's noise"
    for a, b in combinations(range(world_size), 2):
        if speeds[a] > speeds[b]:
            assert split[a] >= split[b] - granularity, "but for what does not divide"


def test_a_speed_test_of_very_unequal_devices_is_a_start() -> None:
    balancer = Balancer(2, 64)
    first, second = balancer.split_from_speeds([4.0, 1.0], (32, 32))
    assert first + second == 64
    assert 32 < first <= 51, "towards the proportional split, 51/13, but not beyond"
    with pytest.raises(ValueError, match="the speed test of rank 1 found 0"):
        balancer.split_from_speeds([4.0, 0.0], (32, 32))


def test_it_explores_until_a_plan_has_stayed() -> None:
    """On equal devices too, but not for long."""
    balancer, exploring = Balancer(2, 64), []
    for step in range(30):
        exploring.append(balancer.is_exploring)
        observe(balancer, step, (32, 32), (1.0, 1.0))
    assert exploring[0]
    assert exploring == sorted(exploring, reverse=True)
    assert not exploring[-1]


def test_exposed_communication_is_that_of_the_rank_for_which_all_others_wait() -> None:
    """If two are ready together, slow communication would permanently be attributed to the wrong one."""
    balancer = Balancer(3, 96)
    observe(balancer, 0, (32, 32, 32), [1.0, 1.0, 1.0])
    observe(balancer, 1, (32, 32, 32), [0.58, 0.56, 0.3], [0.20, 0.22, 0.48])
    assert balancer.exposed_communication() == (0.0, 0.0, 0.0)
    observe(balancer, 2, (32, 32, 32), [0.3, 0.76, 0.3], [0.48, 0.02, 0.48])
    assert balancer.exposed_communication() == (0.02, 0.02, 0.02), (
        "of the others nothing is known: they are taken to be like it"
    )
    observe(balancer, 3, (32, 32, 32), [0.3, 0.5, 0.7], [0.44, 0.24, 0.04])
    assert balancer.exposed_communication() == (0.03, 0.02, 0.04)
    observe(balancer, 4, (32, 32, 32), [0.3, 0.5, 0.7], [0.0, 0.24, 0.04])
    assert balancer.exposed_communication() == (0.03, 0.02, 0.04), "not measured on all ranks"


def seconds_at(balancer: Balancer, rank: int, local_batch: int) -> float:
    models = balancer.models()
    assert models is not None
    return models[rank].seconds(local_batch)


@pytest.mark.parametrize(
    ("sync", "after_backward", "slow", "fast"),
    [
        ([0.16, 0.15], False, 0.75, 0.62),  # ready together: nobody has begun to communicate
        ([0.50, 0.15], True, 0.75, 0.62),  # the slow one is the last, but it could not begin
        ([0.50, 0.05], False, 0.60, 0.62),  # the last has communicated during its backward pass: the rest is exposed
        ([0.02, 0.50], True, 0.60, 0.62),  # the fast one is the last: what the slow one communicates costs it nothing
        ([0.0, 0.15], True, 0.60, 0.62),  # not measured on all ranks
    ],
)
def test_a_slow_communicator_is_charged_with_what_it_will_do_during_its_backward_pass(sync, after_backward, slow, fast):
    balancer = Balancer(2, 64)
    observe(balancer, 0, (56, 8), [1.0, 1.0])
    observe(balancer, 1, (56, 8), [0.62, 0.60], sync, after_backward=after_backward)
    assert seconds_at(balancer, 0, 56) == pytest.approx(fast)
    assert seconds_at(balancer, 1, 8) == pytest.approx(slow)
    assert max(balancer.exposed_communication()) == (0.05 if sync[1] == 0.05 else 0.0), "nothing else is exposed"


def test_exposed_communication_is_not_charged_twice() -> None:
    balancer = Balancer(2, 64)
    observe(balancer, 0, (56, 8), [1.0, 1.0])
    observe(balancer, 1, (48, 16), [0.50, 0.90], [0.5, 0.05])
    observe(balancer, 2, (56, 8), [0.62, 0.60], [0.16, 0.15])
    assert seconds_at(balancer, 1, 8) == pytest.approx(0.70)


def test_equally_fast_ranks_are_charged_with_nothing() -> None:
    balancer = Balancer(2, 64)
    observe(balancer, 0, (32, 32), [1.0, 1.0])
    observe(balancer, 1, (32, 32), [0.60, 0.62], [0.16, 0.15], after_backward=True)
    assert (seconds_at(balancer, 0, 32), seconds_at(balancer, 1, 32)) == pytest.approx((0.60, 0.62))


def test_a_useful_step_gives_a_proposal_and_it_is_not_repeated_while_the_old_plan_still_runs() -> None:
    """Loaders prefetch, so steps under the old plan continue for a while; they are recorded, but decide nothing."""
    balancer = Balancer(2, 64)
    observe(balancer, 0, (32, 32), [1.0, 1.0])
    assert balancer.propose((32, 32)) is None
    observe(balancer, 1, (32, 32), [0.25, 1.0])
    proposal = balancer.propose((32, 32))
    assert proposal is not None
    assert proposal.reason == "explore"
    assert sum(proposal.local_batches) == 64
    assert proposal.local_batches[0] > 51, "beyond the proportional split, 51/13"
    for step in range(2, 9):
        observe(balancer, step, (32, 32), [0.25, 1.0])
        assert balancer.propose(proposal.local_batches) is None
    observe(balancer, 9, proposal.local_batches, [0.4, 0.6])
    again = balancer.propose(proposal.local_batches)
    assert again is not None
    assert again.reason == "balance"
    assert again.predicted_seconds == tuple(seconds_at(balancer, rank, b) for rank, b in enumerate(again.local_batches))


def test_a_pause_right_after_a_re_plan_does_not_undo_it() -> None:
    """After the first plans, a single step, however slow, is no reason for a new one."""
    balancer, plan = Balancer(2, 64), (32, 32)
    for step in range(3):
        observe(balancer, step, plan, [0.3, 1.2])
    plan = balancer.propose(plan).local_batches
    for step in range(3, 5):
        observe(balancer, step, plan, [0.5, 0.8])
    proposal = balancer.propose(plan)
    plan = proposal.local_batches
    observe(balancer, 5, plan, [proposal.predicted_seconds[0], 10 * proposal.predicted_seconds[1]])
    assert balancer.propose(plan) is None
    for step in range(6, 12):
        observe(balancer, step, plan, proposal.predicted_seconds)
        assert balancer.propose(plan) is None


def test_a_noisy_second_step_is_no_reference_for_a_drift() -> None:
    """The steps after it are all faster: initialization is over, no device has sped up."""
    balancer = Balancer(2, 64)
    for step, factor in enumerate([9.0, 1.3, 1.0, 1.0, 1.0, 1.0]):
        observe(balancer, step, (32, 32), [0.3 * factor, 1.2 * factor])
    proposal = balancer.propose((32, 32))
    assert proposal is not None
    assert proposal.reason == "explore"


def test_every_proposal_keeps_the_limits() -> None:
    """A share below `minimum` or off the granularity would break what a rank can compute."""
    balancer = Balancer(3, 96, minimum=4, granularity=8)
    plan = proportional(96, [1, 1, 1], granularity=8)
    plans = [plan]
    for step in range(60):
        observe(balancer, step, plan, [0.01 * plan[0], 0.05 * plan[1], 3.0 + 0.5 * plan[2]])
        if (proposal := balancer.propose(plan)) is not None:
            plan = proposal.local_batches
            plans.append(plan)
    assert len(plans) > 1
    assert all(sum(p) == 96 and min(p) >= 8 and not any(b % 8 for b in p) for p in plans)
    assert plan[2] == 8


def test_what_a_run_has_measured_gives_the_next_one_a_split_as_good_as_its_last() -> None:
    """The state is plain numbers: it survives JSON."""
    for seed in range(6):
        run = Run([measured(RANK_0), measured(RANK_1)], 64, 0.03, seed).steps(60)
        state = json.loads(json.dumps(run.balancer.state_dict()))
        proposal = Balancer(2, 64, state=state).first_plan()
        assert proposal.reason == "profile"
        assert (
            max(curve(b) for curve, b in zip(run.curves, proposal.local_batches, strict=True)) <= 1.06 * BEST_MEASURED
        )


@pytest.mark.parametrize("drawn", [1, 12, 30])
def test_plans_follow_each_other_as_quickly_where_loaders_have_drawn_ahead(drawn: int) -> None:
    """The remaining steps of the old plan do not mean that the new plan has settled."""
    balancer, equal = Balancer(2, 64), (32, 32)

    def run(split: tuple[int, ...], steps: int) -> None:
        for _ in range(steps):
            observe(balancer, 0, split, [0.05 + 0.01 * split[0], 0.1 + 0.04 * split[1]])

    run(equal, 1)
    first = balancer.propose(equal)
    assert first is not None
    for _ in range(drawn):
        run(equal, 1)
        assert balancer.propose(first.local_batches) is None
    run(first.local_batches, 2)
    better = balancer.propose(first.local_batches)
    assert better is not None, "two steps at it are enough"
    assert better.reason == "balance"


def test_a_plan_that_has_stayed_for_long_is_reconsidered_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes milliseconds, on every rank between forward and backward."""
    reconsidered: set[int] = set()
    expected_maximum = balancing.expected_maximum
    monkeypatch.setattr(
        balancing, "expected_maximum", lambda *times: reconsidered.add(step) or expected_maximum(*times)
    )
    balancer = Balancer(2, 64)
    for step in range(200):
        observe(balancer, step, (32, 32), [0.4, 0.4])
        assert balancer.propose((32, 32)) is None
    assert len([step for step in reconsidered if step < 50]) > 5
    assert 1 <= len([step for step in reconsidered if step >= 100]) <= 10


def test_what_is_kept_is_bounded() -> None:
    """A run of weeks must not grow its checkpoint."""
    balancer, rng = Balancer(2, 64), np.random.default_rng(0)
    sizes = set()
    for step in range(600):
        first = int(rng.integers(1, 64))
        observe(balancer, step, (first, 64 - first), [0.1 + 0.01 * first, 0.1])
        sizes.add(sum(len(s) for rank in balancer.state_dict()["measured"] for _, s in rank))
    assert max(sizes) < 2 * KEPT_LOCAL_BATCHES * (KEPT + 10)


@pytest.mark.parametrize(
    ("local_batches", "seconds", "said"),
    [
        ((4, 4), [1.0], "got 2 local batches and 1 times for 2 ranks"),
        ((8,), [1.0, 1.0], "got 1 local batches and 2 times for 2 ranks"),
        ((4, 5), [1.0, 1.0], r"\(4, 5\) are not a split of 8 samples"),
        ((0, 8), [1.0, 1.0], r"\(0, 8\) are not a split of 8 samples"),
        ((4, 4), [1.0, math.nan], "step 7: rank 1 measured nan seconds"),
        ((4, 4), [-0.5, 1.0], r"step 7: rank 0 measured -0\.5 seconds"),
        ((4, 4), [1.0, math.inf], "rank 1 measured inf"),
    ],
)
def test_what_cannot_have_been_measured_raises_with_the_numbers(local_batches: tuple, seconds: list, said: str) -> None:
    """Also in the first step, which is not used: a broken clock is reported at once."""
    with pytest.raises(ValueError, match=said):
        observe(Balancer(2, 8), 7, local_batches, seconds)


def test_limits_that_leave_no_split_raise_at_once() -> None:
    with pytest.raises(ValueError, match="add up to 16 samples, 8 more than the global batch 8"):
        Balancer(2, 8, minimum=8)
    with pytest.raises(ValueError, match="at least 1 sample to be measured, got minimum 0"):
        Balancer(2, 8, minimum=0)


@pytest.mark.parametrize("steps", [(3, 2), (4, 3), (6, 3), (3, 5), (2, 3)])
@pytest.mark.parametrize("factor", [2.0, 3.0, 6.0])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disturbance_while_exploring_is_recovered_from(steps: tuple[int, int], factor: float, rank: int) -> None:
    """A split that was tried during it was abandoned at once, and would look bad forever if it were not retried."""
    first, number = steps
    for seed in range(3):
        run = Run([lambda b: 0.05 + 0.01 * b, lambda b: 0.1 + 0.04 * b], 64, 0.02, seed)
        calm = list(run.curves)
        for step in range(90):
            disturbed = first <= step < first + number
            run.curves[rank] = slowed(calm[rank], factor) if disturbed else calm[rank]
            run.steps(1)
        assert np.mean(run.makespans[60:]) <= 1.08 * best_makespan(calm, 64)


@pytest.mark.parametrize("compiling", [1, 2])
def test_a_local_batch_that_is_compiled_first_is_not_avoided(compiling: int) -> None:
    """`torch.compile` takes many times a step for each new shape, on every rank."""
    for seconds in (3.0, 30.0):
        run = Run([lambda b: 0.05 + 0.01 * b, lambda b: 0.1 + 0.04 * b], 64, 0.02, 0)
        calm, seen = list(run.curves), [{}, {}]

        def curve(rank: int, b: float, calm: list = calm, seen: list = seen, extra: float = seconds) -> float:
            seen[rank][b] = seen[rank].get(b, 0) + 1
            return calm[rank](b) + (extra if seen[rank][b] <= compiling else 0.0)

        run.curves = [lambda b, rank=rank, curve=curve: curve(rank, b) for rank in range(2)]
        run.steps(150)
        assert np.mean(run.makespans[120:]) <= 1.1 * best_makespan(calm, 64)


# ---- laws ----

lines = st.tuples(st.floats(0, 0.5), st.floats(0.001, 0.05))


@settings(max_examples=30)  # each is a run of 70 steps
@given(st.lists(lines, min_size=2, max_size=8), st.integers(4, 40))
def test_without_noise_it_finds_a_split_near_the_best_and_stays_near_it(
    devices: list[tuple[float, float]], each: int
) -> None:
    """Between splits that are as fast as each other it may still change: one sample more is much of a small share."""
    curves = [lambda b, f=f, s=s: f + s * b for f, s in devices]
    run = Run(curves, each * len(curves), 0.0, 0).steps(70)
    best, equal = best_makespan(curves, each * len(curves)), max(curve(each) for curve in curves)
    near = (1.06 if equal > 1.25 * best else 1.2) * best  # a small imbalance is not explored
    assert max(run.makespans[40:]) <= near
    assert max(run.makespans[12:]) <= 1.01 * equal, "never slower than plain DDP's split once it has explored"


@given(
    st.lists(lines, min_size=2, max_size=6),
    st.integers(2, 20),
    st.sampled_from([1, 2]),
    st.integers(0, 100),
)
def test_no_proposal_exceeds_the_maximum(devices: list, each: int, granularity: int, seed: int) -> None:
    """And where the plan in force does, there is a proposal at once."""
    world_size, rng = len(devices), np.random.default_rng(seed)
    global_batch = each * granularity * world_size
    balancer = Balancer(world_size, global_batch, granularity=granularity)
    equal = plan = proportional(global_batch, [1] * world_size, granularity=granularity)
    maximum = [granularity * int(rng.integers(1, 2 * each)) for _ in equal]
    maximum[0] += max(0, global_batch - sum(maximum))
    for step in range(40):
        observe(balancer, step, plan, [fixed + per * b for (fixed, per), b in zip(devices, plan, strict=True)])
        proposal = balancer.propose(plan, maximum)
        if proposal is not None:
            plan = proposal.local_batches
            assert all(b <= most for b, most in zip(plan, maximum, strict=True))
        elif step > 0:
            assert all(b <= most for b, most in zip(plan, maximum, strict=True))


@settings(max_examples=20)  # each is four runs of 40 steps
@given(lines, lines, st.integers(8, 100))
def test_more_memory_never_gives_a_slower_split(first: tuple, second: tuple, global_batch: int) -> None:
    """With the same measurements."""
    devices = (first, second)
    before = math.inf
    for most in np.linspace(global_batch // 2 + 1, global_batch, 4).astype(int).tolist():
        balancer = Balancer(2, global_batch)
        split = proportional(global_batch, [1, 1])
        for step in range(40):
            observe(balancer, step, split, [fixed + per * b for (fixed, per), b in zip(devices, split, strict=True)])
            proposal = balancer.propose(split, [most, most])
            split = proposal.local_batches if proposal is not None else split
        makespan = max(fixed + per * b for (fixed, per), b in zip(devices, split, strict=True))
        assert makespan <= 1.04 * before, "but for a gain that is not worth a plan"
        before = min(before, makespan)
