"""Step-time models: how many seconds a rank needs for a local batch, fitted to its own steps.

A model is a fixed cost plus a cost per sample, refined piecewise where measurements at several local batches require
it: GPUs are flat at small batches, allocators make curves jump, and curves of throttled CPUs are concave. One straight
line fits none of them.
"""

import math
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Self

# A piece that rises by less than this part of its time is flat. Far below what a clock resolves, and it keeps the
# inverse (the largest local batch within a time) well conditioned, on which exact allocation relies. Chosen.
_FLAT = 1e-6

# Slopes beyond the ends are taken over at least this ratio of local batches, if any are that far apart: two noisy
# neighbors do not determine a slope. Chosen.
_SPAN = 4 / 3


@dataclass(frozen=True, slots=True)  # slots: allocation reads thousands of them, one cache miss less each
class StepTimeModel:
    """Seconds that one rank by itself needs for a local batch, as a non-decreasing piecewise linear curve.

    Attributes:
        breakpoints: local batches (samples) where the slope may change; strictly increasing, the first is 0.
        times: seconds at each breakpoint, non-decreasing; ``times[0]`` is the fixed cost of a step.
        slope: seconds per sample beyond the last breakpoint.
        slopes: seconds per sample to the right of each breakpoint; 0 where the piece is flat.
        packed: local batch, seconds and slope of each breakpoint as native float64, row by row, then a row of infinity:
            `allocation.allocate` joins the bytes of thousands of models and reads them at once.

    Raises:
        ValueError: the curve falls, is negative, is not finite, or is 0 at a local batch of 1.
    """

    breakpoints: tuple[int, ...]
    times: tuple[float, ...]
    slope: float
    slopes: tuple[float, ...] = field(init=False, repr=False, compare=False)
    packed: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        x, t = self.breakpoints, self.times
        if len(x) != len(t) or not x or x[0] != 0 or any(a >= b for a, b in pairwise(x)):
            raise ValueError(f"breakpoints must rise from 0 with one time each, got breakpoints {x} and times {t}")
        if not all(math.isfinite(v) and v >= 0 for v in (*t, self.slope)) or any(a > b for a, b in pairwise(t)):
            raise ValueError(f"times and slope must be finite and never fall, got times {t} and slope {self.slope}")
        if t[0] == 0 and (t[1] if len(t) > 1 else self.slope) == 0:
            raise ValueError(f"a local batch cannot take 0 s, got breakpoints {x}, times {t}, slope {self.slope}")
        pieces = zip(pairwise(x), pairwise(t), strict=True)
        slopes = [(v - u) / (b - a) if v - u > _FLAT * u else 0.0 for (a, b), (u, v) in pieces]
        slopes.append(self.slope if self.slope * max(x[-1], 1) > _FLAT * t[-1] else 0.0)
        rows = [v for row in zip(x, t, slopes, strict=True) for v in row] + [math.inf] * 3
        object.__setattr__(self, "slopes", tuple(slopes))
        object.__setattr__(self, "packed", struct.pack(f"{len(rows)}d", *rows))

    @classmethod
    def fit(cls, local_batches: Sequence[int], seconds: Sequence[float]) -> Self:
        """Fit a model to measured steps of one rank.

        The median of the measurements at each local batch is a breakpoint, so that one disturbed step does no harm
        if there are others. Where medians fall as the local batch grows, neighbors are pooled until they don't
        (isotonic regression by pooling adjacent violators; the pool's value is the median of its measurements, so each
        has the same weight). With a single distinct local batch the fixed cost is unknown, and the time is taken as
        proportional to the local batch.

        Args:
            local_batches: samples of each measured step, in any order; they may repeat.
            seconds: compute time in each of these steps.

        Raises:
            ValueError: there are no measurements, or a value that can't have been measured.
        """
        if len(local_batches) != len(seconds):
            raise ValueError(f"got {len(local_batches)} local batches and {len(seconds)} times: they must be pairs")
        if not local_batches:
            raise ValueError("cannot fit a step-time model to no measurements")
        measured: dict[int, list[float]] = {}
        for local_batch, time in zip(local_batches, seconds, strict=True):
            if not local_batch >= 1 or local_batch != int(local_batch):
                raise ValueError(f"a local batch is a whole number of samples, at least 1, got {local_batch}")
            if not (math.isfinite(time) and time > 0):
                raise ValueError(f"measured {time} seconds for a local batch of {local_batch}: not a positive number")
            measured.setdefault(int(local_batch), []).append(float(time))
        x = sorted(measured)
        pools: list[tuple[int, list[float], float]] = []  # (breakpoints in the pool, their measurements, median)
        for local_batch in x:
            size, values = 1, measured[local_batch]
            while pools and pools[-1][2] > median(values):
                more, earlier, _ = pools.pop()
                size, values = size + more, earlier + values
            pools.append((size, values, median(values)))
        t = [value for size, _, value in pools for _ in range(size)]
        if len(x) == 1:
            return cls((0, x[0]), (0.0, t[0]), t[0] / x[0])
        far = next((i for i in range(1, len(x)) if x[i] >= _SPAN * x[0]), len(x) - 1)
        fixed = t[0] - x[0] * (t[far] - t[0]) / (x[far] - x[0])
        # The nearest rise to the left of the end. A curve that is flat everywhere does not show where its flat part
        # ends: more samples should not cost more than in proportion, so that is the cautious choice.
        near = [i for i in reversed(range(len(x) - 1)) if x[-1] >= _SPAN * x[i]] or [0]
        rises = ((t[-1] - t[i]) / (x[-1] - x[i]) for i in near if t[-1] - t[i] > _FLAT * t[i])
        return cls((0, *x), (min(max(fixed, 0.0), t[0]), *t), next(rises, t[-1] / x[-1]))

    def seconds(self, local_batch: int) -> float:
        """Predicted seconds for a local batch of at least 1 sample: positive, and never less for more samples."""
        if not local_batch >= 1:
            raise ValueError(f"a local batch has at least 1 sample, got {local_batch}")
        i = bisect_right(self.breakpoints, local_batch) - 1
        time = self.times[i] + self.slopes[i] * (local_batch - self.breakpoints[i])
        # Rounding must not lift the end of a piece above the start of the next.
        return min(time, self.times[i + 1]) if i + 1 < len(self.times) else time

    def scaled(self, factor: float, plus: float = 0.0) -> Self:
        """The curve with all seconds multiplied by `factor`, and `plus` seconds added."""
        return type(self)(self.breakpoints, tuple(factor * t + plus for t in self.times), factor * self.slope)
