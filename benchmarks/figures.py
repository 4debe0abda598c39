"""From step times to what a report says; pure functions of numbers."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

Split = tuple[int, ...]
"""Local batches of all ranks."""

TOLERANCE = 0.05
"""A split is as good as the best when its step takes at most this part longer."""

LATE = 20
"""Steps after a change until a plan should have followed it."""

_LAST = 10  # steps that show a rank's compute time: its quota may have been another before


def parse_split(text: str) -> Split:
    """A split as people write it: 60/4.

    Raises:
        ValueError: it is none.
    """
    split = tuple(int(part) for part in text.split("/"))
    if min(split) < 1:
        raise ValueError(f"every rank of a split needs a sample, got {text}")
    return split


def show_split(split: Sequence[int]) -> str:
    """60/4."""
    return "/".join(map(str, split))


def steady(seconds: Sequence[float], warm_up: int) -> list[float]:
    """A turn's step times without the first ones.

    Raises:
        ValueError: nothing would be left.
    """
    if warm_up < 1:
        raise ValueError("the first step of a turn also measures how long the side was asleep")
    if len(seconds) <= warm_up:
        raise ValueError(f"{len(seconds)} steps leave nothing after a warm-up of {warm_up}")
    return list(seconds[warm_up:])


def middle(rounds: Sequence[Sequence[float]]) -> float:
    """The median of all step times of all rounds."""
    return median(time for times in rounds for time in times)


def gain(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times faster `fast` is: the ratio within each round, so that both saw the same disturbances.

    Args:
        slow: step times of each round.
        fast: step times of each round; where a side took part in the later rounds only, both are cut to those.

    Returns:
        the median over the rounds, and the least and the greatest.
    """
    last = min(len(slow), len(fast))
    ratios = [median(a) / median(b) for a, b in zip(slow[-last:], fast[-last:], strict=True)]
    return spread(ratios)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the least and the greatest."""
    return {"median": median(values), "least": min(values), "greatest": max(values)}


def scaled(values: Mapping[str, float], factor: float) -> dict[str, float]:
    """All of a spread times a number above 0."""
    return {name: value * factor for name, value in values.items()}


def best_of(rounds: Mapping[Split, Sequence[Sequence[float]]]) -> Split:
    """The split whose step takes least, by the median of its ratios to the mean of all splits in the same round.

    Choose by rounds that are not reported: the least of several noisy times is too good.
    """
    means = [sum(map(median, at)) / len(at) for at in zip(*rounds.values(), strict=True)]
    ratios = {s: median(median(t) / mean for t, mean in zip(times, means, strict=True)) for s, times in rounds.items()}
    return min(ratios, key=ratios.__getitem__)


def between(times: Mapping[Split, float], split: Split) -> float | None:
    """The step time of a split from those of measured ones, for two ranks by linear interpolation; None: unknown."""
    if split in times:
        return times[split]
    if len(split) != 2:
        return None
    for a, b in pairwise(sorted(times)):
        if a < split < b:
            part = (split[0] - a[0]) / (b[0] - a[0])
            return times[a] + part * (times[b] - times[a])
    return None


def steps_of(first: int, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A turn step by step: number, seconds, and the split where there is one.

    Args:
        first: how many steps the side had trained before.
        result: see `Side.train`.
    """
    steps = [{"step": first + i, "seconds": seconds} for i, seconds in enumerate(result["seconds"])]
    for step, split in zip(steps, result["splits"], strict=False):
        step["split"] = split
    return steps


def compute_times(steps: Sequence[Mapping[str, Any]], split: Split) -> list[float]:
    """The median of each rank's compute time in the last steps of a split; [] where nothing is known."""
    known = [step["compute"] for step in steps if "compute" in step and tuple(step["split"]) == split]
    return [median(column) for column in zip(*known[-_LAST:], strict=True)]


def plans_within(plans: Sequence[tuple[int, Split]], first: int, end: int) -> list[tuple[int, Split]]:
    """What `changes` would say of the steps from `first` to before `end` alone."""
    before = [split for step, split in plans if step <= first]
    return [(first, before[-1]), *((step, split) for step, split in plans if first < step < end)]


def changes(splits: Sequence[tuple[int, Split]]) -> list[tuple[int, Split]]:
    """The steps at which the split changed, the first step included, from (step, split) of every step."""
    kept: list[tuple[int, Split]] = []
    for step, split in splits:
        if not kept or kept[-1][1] != split:
            kept.append((step, split))
    return kept


def settled(
    plans: Sequence[tuple[int, Split]], times: Mapping[Split, float], tolerance: float = TOLERANCE
) -> int | None:
    """The step from which on every split is within `tolerance` of the best one's time; None if the last is not.

    Args:
        plans: see `changes`.
        times: step times of fixed splits.
        tolerance: a part of the best time.
    """
    limit = (1 + tolerance) * min(times.values())
    first: int | None = None
    for step, split in plans:
        time = between(times, split)
        if time is None or time > limit:
            first = None
        elif first is None:
            first = step
    return first


def as_fast_from(
    turns: Sequence[Sequence[float]], fixed: Sequence[Sequence[float]], window: int, tolerance: float = TOLERANCE
) -> int | None:
    """The first step from which on a run is as fast as a fixed split that takes turns with it; None if it never is.

    It is where the median of so many steps in a row is at most a part longer than that of the fixed split in the turn
    beside. Unlike `settled` it needs no times of other splits, and sees both at the same time.

    Args:
        turns: step times of all turns of the run, nothing left out.
        fixed: step times of the fixed split in the turn beside each, without warm-up.
        window: steps in a row, all of the same turn.
        tolerance: a part of the fixed split's time.
    """
    began = 0
    for times, beside in zip(turns, fixed, strict=True):
        for first in range(len(times) - window + 1):
            if median(times[first : first + window]) <= (1 + tolerance) * median(beside):
                return began + first
        began += len(times)
    return None


def whole_run(turns: Sequence[Sequence[float]], fixed: Sequence[Sequence[float]], *, first_step: bool) -> float:
    """The part of the best fixed split's speed that a run reached from its first step on, exploration included.

    What the fixed split would have taken for as many steps, at its median of the turn beside each turn of the run, over
    what the run took.

    Args:
        turns: step times of all turns of the run, nothing left out.
        fixed: step times of the fixed split in the turn beside each, without warm-up.
        first_step: whether the run's first step counts, which also initializes the process.
    """
    skipped = 0 if first_step else 1
    counted = [list(turn) for turn in turns]
    counted[0] = counted[0][skipped:]
    ideal = sum(len(turn) * median(times) for turn, times in zip(counted, fixed, strict=True))
    return ideal / sum(map(sum, counted))
