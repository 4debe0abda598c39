"""From step times to what a report says; pure functions of numbers."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

from lightning_hetero.allocation import proportional

Split = tuple[int, ...]

_POWERS = (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
"""Shares go with the solo rates to these powers; fixed costs put the best split beyond the proportional one."""


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
    """A segment's step times without the first ones.

    Raises:
        ValueError: nothing would be left.
    """
    if warm_up < 1:
        raise ValueError("the first step of a segment also measures how long the side was asleep")
    if len(seconds) <= warm_up:
        raise ValueError(f"{len(seconds)} steps leave nothing after a warm-up of {warm_up}")
    return list(seconds[warm_up:])


def middle(rounds: Sequence[Sequence[float]]) -> float:
    """The median of all step times of all rounds."""
    return median(time for times in rounds for time in times)


def gain(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times faster `fast` is: the ratio within each round, so that both saw the same disturbances.

    Returns:
        the median over the rounds, and the least and the greatest.
    """
    ratios = [median(a) / median(b) for a, b in zip(slow, fast, strict=True)]
    return {"median": median(ratios), "least": min(ratios), "greatest": max(ratios)}


def grid(rates: Sequence[float], global_batch: int, minimum: int) -> list[Split]:
    """Splits from equal to far beyond the one in proportion to `rates` (samples/s of each rank alone)."""
    splits = [proportional(global_batch, [rate**power for rate in rates], minimum=minimum) for power in _POWERS]
    return sorted(dict.fromkeys(splits))


def neighbours(split: Split, samples: int, minimum: int) -> list[Split]:
    """The splits that come from moving `samples` from one rank to another."""
    found = []
    for giver in range(len(split)):
        for taker in range(len(split)):
            if giver != taker and split[giver] - samples >= minimum:
                moved = list(split)
                moved[giver] -= samples
                moved[taker] += samples
                found.append(tuple(moved))
    return found


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


def changes(splits: Sequence[tuple[int, Split]]) -> list[tuple[int, Split]]:
    """The steps at which the split changed, the first step included, from (step, split) of every step."""
    kept: list[tuple[int, Split]] = []
    for step, split in splits:
        if not kept or kept[-1][1] != split:
            kept.append((step, split))
    return kept


def settled(plans: Sequence[tuple[int, Split]], times: Mapping[Split, float], tolerance: float = 0.05) -> int | None:
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
