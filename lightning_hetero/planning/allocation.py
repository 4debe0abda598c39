"""How to split a global batch over ranks: optimally for step-time models, or in proportion to given shares.

Pure functions: all ranks that call them with the same numbers get the same split.
"""

import math
from collections.abc import Sequence
from operator import index
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.planning.step_time import StepTimeModel

_Floats: TypeAlias = NDArray[np.float64]
_Ints: TypeAlias = NDArray[np.int64]


def allocate(
    models: Sequence[StepTimeModel],
    global_batch: int,
    *,
    minimum: int | Sequence[int] = 1,
    maximum: int | Sequence[int] | None = None,
    granularity: int = 1,
) -> tuple[int, ...]:
    """Split a global batch over ranks so that the slowest of them finishes as early as possible.

    Exact: no other split within the limits has a smaller makespan ``max_r models[r].seconds(b_r)``. Handing out
    samples one (or ``granularity``) at a time, each to the rank that would finish first with it, solves this resource
    allocation problem for non-decreasing times (the greedy method for minimax objectives, see T. Ibaraki, N. Katoh,
    "Resource Allocation Problems", MIT Press, 1988). Where ranks would finish at the same time, the one with fewer
    samples comes first, then the lower rank.

    The samples are not handed out one by one: the makespan is found by bisection over all ranks at once, and only the
    last few samples of each rank are compared one by one.

    Args:
        models: one per rank.
        global_batch: samples to hand out; a multiple of ``granularity``.
        minimum: smallest local batch, for all ranks or one per rank; rounded up to ``granularity``. It may be 0.
        maximum: largest local batch, likewise; rounded down. None: no limit.
        granularity: local batches are multiples of it.

    Returns:
        Local batches, one per rank; they add up to ``global_batch``.

    Raises:
        ValueError: there is no such split; the message says by how many samples.
    """
    world_size = len(models)
    low, total = _lower_limits(world_size, global_batch, minimum, granularity)
    high = _upper_limits(low, total, maximum, granularity)
    if int(low.sum()) == total:
        return tuple(low.tolist())
    return _by_makespan(Curves([model.packed for model in models]), total, low, high, granularity)


def expected_maximum(means: Sequence[float], deviations: Sequence[float]) -> float:
    """Mean of the largest of W independent normal variables: how long a step takes when its ranks' times vary.

    The integral over the product of their distribution functions, by the trapezoidal rule; the normal distribution
    function is approximated by a hyperbolic tangent (E. Page, Applied Statistics 26, 1977), accurate to 2e-4.
    Deviations are standard deviations, at least 0.
    """
    mean = np.asarray(means, dtype=np.float64)  # (W,)
    deviation = np.maximum(np.asarray(deviations, dtype=np.float64), 1e-9 * np.abs(mean).max())  # (W,)
    low, high = (mean - 5 * deviation).max(), (mean + 5 * deviation).max()
    x = np.linspace(low, high, 200)  # (200,); the number and the 5 deviations are chosen for that accuracy
    z = (x[:, None] - mean) / deviation  # (200, W)
    below = (0.5 * (1 + np.tanh(0.7978845608 * z * (1 + 0.044715 * z * z)))).prod(axis=1)  # (200,)
    # Trapezoidal rule; numpy's own function for it had another name before 2.0.
    return float(high - (below.sum() - (below[0] + below[-1]) / 2) * (x[1] - x[0]))


def proportional(
    global_batch: int,
    shares: Sequence[float],
    *,
    minimum: int | Sequence[int] = 1,
    maximum: int | Sequence[int] | None = None,
    granularity: int = 1,
) -> tuple[int, ...]:
    """Split a global batch in proportion to ``shares``, by largest remainders (Hamilton's method).

    A rank whose share comes to less than its minimum gets the minimum, one whose share comes to more than its maximum
    gets the maximum, and the rest is split among the others in proportion. What they can't take goes to ranks whose
    share is 0, in equal parts. Among equal remainders, the lower rank comes first.

    Shares are one non-negative number per rank, such as ``[4, 1]``; only their ratios matter. The other arguments, the
    result and the errors are those of `allocate`.
    """
    for rank, share in enumerate(shares):
        if not math.isfinite(share):
            raise ValueError(f"share {share} of rank {rank} is not a finite number")
        if share < 0:
            raise ValueError(f"share {share} of rank {rank} is negative")
    low, total = _lower_limits(len(shares), global_batch, minimum, granularity)
    weights = np.asarray(shares, dtype=np.float64)  # (W,)
    if not weights.any():
        raise ValueError(f"the shares {list(shares)} add up to zero: at least one rank must have a share")
    weights = weights / weights.max()  # sums of huge or tiny shares stay finite and above 0
    units, least = total // granularity, low // granularity
    most = _upper_limits(low, total, maximum, granularity) // granularity
    quota = _filled(units, weights, least, most)  # (W,)
    # Ranks at a limit, and ranks with a share of 0, have no remainder, so none of the missing units go to them.
    result = np.floor(quota).astype(np.int64)  # (W,)
    order = np.argsort(result - quota, kind="stable")  # (W,) ranks, the largest remainder first
    order = order[(result < most)[order]]
    result[order[: units - int(result.sum())]] += 1
    return tuple((result * granularity).tolist())


def _filled(units: int, weights: _Floats, least: _Ints, most: _Ints) -> _Floats:
    """(W,) quotas between the limits that add up to ``units``, in proportion to the weights where no limit holds."""
    free, quota = np.ones(len(weights), dtype=bool), least.astype(np.float64)  # (W,) each
    while free.any():
        rest = units - int(quota[~free].sum())  # quotas fixed at a limit are whole numbers
        scale = weights[free].sum()
        if scale == 0:  # equal parts of what the ranks with a share leave, if anything
            if rest <= int(least[free].sum()):
                return np.where(free, least, quota)
            weights = np.where(free, 1.0, weights)
            continue
        quota = np.where(free, rest * weights / scale, quota)
        kept = np.clip(quota, least, most)
        # If clipping adds samples in all, the lower limits hold in any case; if it removes some, the upper ones do.
        too_much = float((kept - quota)[free].sum())
        held = free & (quota < least if too_much > 0 else quota > most if too_much < 0 else kept != quota)
        if not held.any():
            return np.asarray(np.where(free, kept, quota), dtype=np.float64)
        quota, free = np.where(held, kept, quota), free & ~held
    return quota


def _per_rank(name: str, limit: int | Sequence[int], world_size: int) -> _Ints:
    """(W,) samples, from a limit given as one number for all ranks or one per rank."""
    values = np.asarray(limit)
    if values.dtype.kind not in "iu" or values.shape not in ((), (world_size,)):
        raise ValueError(f"{name} must be an int, or one per rank for {world_size} ranks, got {limit!r}")
    if (values < 0).any():
        raise ValueError(f"{name} must not be negative, got {int(values.min())}")
    return np.broadcast_to(values.astype(np.int64), (world_size,))


def _lower_limits(
    world_size: int, global_batch: int, minimum: int | Sequence[int], granularity: int
) -> tuple[_Ints, int]:
    """(W,) smallest local batches, and the global batch as an int; checks arguments for both ways to split."""
    if world_size < 1:
        raise ValueError("there must be at least one rank")
    if (step := index(granularity)) < 1:
        raise ValueError(f"granularity must be at least 1, got {step}")
    if (total := index(global_batch)) < 1:
        raise ValueError(f"the global batch must have at least 1 sample, got {total}")
    if total % step:
        below = total // step * step
        raise ValueError(
            f"the global batch {total} is not a multiple of granularity {step}:"
            f" the nearest that are: {f'{below} and ' if below else ''}{below + step}"
        )
    low = -(-_per_rank("minimum", minimum, world_size) // step) * step
    if (need := int(low.sum())) > total:
        multiples = f", rounded up to multiples of {step}," if step > 1 else ""
        raise ValueError(
            f"the minimums of all {world_size} ranks{multiples} add up to {need} samples,"
            f" {need - total} more than the global batch {total}"
        )
    return low, total


def _upper_limits(low: _Ints, total: int, maximum: int | Sequence[int] | None, granularity: int) -> _Ints:
    """(W,) largest local batches."""
    high: _Ints = low + (total - int(low.sum()))  # no rank can get more than the others' minimums leave
    if maximum is None:
        return high
    caps = _per_rank("maximum", maximum, len(low)) // granularity * granularity
    if (caps < low).any():
        rank = int(np.argmax(caps < low))
        raise ValueError(
            f"rank {rank}: no multiple of granularity {granularity} lies between its minimum and its maximum"
            f" (rounded to the granularity, the maximum is {low[rank] - caps[rank]} samples below the minimum)"
        )
    if (most := int(caps.sum())) < total:
        short = f"{total - most} short of the global batch {total}"
        raise ValueError(f"the caps of all ranks add up to {most} samples, {short}")
    return np.minimum(high, caps)


class Curves:
    """The step-time models of all ranks in flat arrays, one after the other; made from W `StepTimeModel.packed`."""

    def __init__(self, packed: Sequence[bytes]) -> None:
        table = np.frombuffer(b"".join(packed)).reshape(-1, 3)  # (K, columns)
        # (K,) each, for the K breakpoints of all models: local batches, seconds, seconds a sample from there on.
        self._batches, self._times, self._slopes = np.ascontiguousarray(table.T)
        rows = np.fromiter(map(len, packed), dtype=np.int64, count=len(packed)) // 24
        self._ends = np.cumsum(rows) - 1  # (W,) the last row of each model
        self._starts = self._ends + 1 - rows  # (W,) and its first row
        self._most = int(rows.max())

    def seconds(self, ranks: _Ints, local_batches: _Ints) -> _Floats:
        """(N,) seconds for (N,) ranks and local batches, bit for bit those of `StepTimeModel.seconds`."""
        at = self._starts.take(ranks)  # (N,) rows
        for _ in range(self._most):
            further = self._batches.take(at + 1) <= local_batches  # never past a model's end, which lies at infinity
            if not further.any():
                break
            at += further
        rise = self._slopes.take(at) * (local_batches - self._batches.take(at))
        times: _Floats = np.minimum(self._times.take(at) + rise, self._times.take(at + 1))
        return times

    def within(self, time: float, low: _Ints, high: _Ints, step: int) -> _Ints:
        """(W,) largest multiples of ``step``, between the limits, that each rank finishes within ``time``."""
        counted = np.cumsum(self._times <= time, dtype=np.int64)  # (K,); twice as fast as `np.add.reduceat`
        reached = np.diff(counted.take(self._ends), prepend=0)  # (W,) breakpoints within the time
        piece = self._starts + np.maximum(reached - 1, 0)  # (W,), like all arrays below
        x, t, slope = self._batches.take(piece), self._times.take(piece), self._slopes.take(piece)
        x_next, t_next = self._batches.take(piece + 1), self._times.take(piece + 1)
        last = np.minimum(x_next - 1, high)  # largest local batch in this piece
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inverse = np.where(slope > 0, np.floor(x + (time - t) / slope), last)
        inverse = np.clip(inverse, np.minimum(x, last), last)
        inverse[t > time] = 0  # less than the fixed cost
        # The division may be off by a rounding error, so the curve itself is checked one sample to each side.
        inverse -= np.minimum(t + slope * (inverse - x), t_next) > time
        inverse += (inverse < last) & (np.minimum(t + slope * (inverse + 1 - x), t_next) <= time)
        whole = inverse.astype(np.int64)
        local_batches: _Ints = np.clip(whole // step * step if step > 1 else whole, low, high)
        return local_batches


def _by_makespan(curves: Curves, total: int, low: _Ints, high: _Ints, step: int) -> tuple[int, ...]:
    """Find where handing out samples one by one would stop, without doing so."""
    world_size, ranks = len(low), np.arange(len(low))
    # Always sum(below) < total <= sum(at_most): what the ranks finish within `shortest` and within `longest`.
    parts = np.clip(-(-total // world_size), low, high)  # (W,), like `below` and `at_most`
    times = curves.seconds(ranks, parts)
    tries = [float(times.min())]  # with equal parts the makespan lies in between
    shortest, longest = 0.0, float(times.max())
    below, at_most = low, curves.within(longest, low, high, step)
    if int(at_most.sum()) < total:  # limits forbid equal parts
        shortest, longest = longest, float(curves.seconds(ranks, high).max())
        below, at_most = at_most, high
    few = max(2 * world_size, 64) * step
    turn = 0
    while (gap := int(at_most.sum() - below.sum())) > few and math.nextafter(shortest, longest) < longest:
        # Aim slightly to alternate sides of the global batch, so that both ends come close; bisect in between, so that
        # no curve can make this slow. The constants were tuned on `benchmarks/allocation.py`.
        aim = (total - int(below.sum()) + (0.3, -0.3)[turn % 2] * few) / gap
        time = tries.pop() if tries else shortest + (longest - shortest) * (aim if turn % 4 and 0 < aim < 1 else 0.5)
        turn += 1
        if not shortest < time < longest:
            continue
        given = curves.within(time, low, high, step)
        if int(given.sum()) < total:
            shortest, below = time, given
        else:
            longest, at_most = time, given
    if gap <= few:
        # N candidates, one for each `step` of a rank above `below`. One of their times is the makespan.
        more = (at_most - below) // step  # (W,)
        rank = np.repeat(ranks, more)  # (N,)
        nth = np.arange(1, len(rank) + 1) - np.repeat(np.cumsum(more) - more, more)  # (N,)
        times = curves.seconds(rank, below[rank] + nth * step)  # (N,)
        missing = (total - int(below.sum())) // step
        makespan = np.partition(times, missing - 1)[missing - 1]
        below = below + step * np.bincount(rank[times < makespan], minlength=world_size)
        at_most = below + step * np.bincount(rank[times == makespan], minlength=world_size)
    return _level(total, below, at_most, step)


def _level(total: int, low: _Ints, high: _Ints, step: int) -> tuple[int, ...]:
    """Fill up from ``low`` towards ``high``, (W,) each, always giving to the rank with the fewest samples."""
    floor, ceiling = int(low.min()) // step, int(high.max()) // step
    while floor < ceiling:
        middle = (floor + ceiling + 1) // 2
        if int(np.clip(middle * step, low, high).sum()) <= total:
            floor = middle
        else:
            ceiling = middle - 1
    result = np.clip(floor * step, low, high)  # (W,)
    growing = np.flatnonzero(np.clip((floor + 1) * step, low, high) > result)
    result[growing[: (total - int(result.sum())) // step]] += step
    return tuple(result.tolist())
