"""Recognizes samplers that shard by rank themselves, from what they have drawn on all ranks."""

from collections.abc import Sequence
from math import log
from typing import Any

_CHANCE = 1e-4
"""Draws of separate ranks that have so few indices in common are shards if chance would do that more rarely than this.
Chosen: below it only lies what is no chance, and 28 samples on two ranks are enough to be that sure."""


def declares_shard(sampler: object, rank: int, world_size: int) -> bool:
    """Whether a sampler, or the one inside a batch sampler, says by its attributes that it draws one rank's shard.

    `DistributedSampler` and samplers like it (torchvision's `RASampler`, timm's) have `num_replicas` and `rank`.
    """
    return any(
        (getattr(source, name, 1), getattr(source, "rank", None)) == (world_size, rank)
        for source in (sampler, getattr(sampler, "sampler", None))
        for name in ("num_replicas", "world_size")
        if world_size > 1
    )


def are_shards(draws: Sequence[Sequence[Any]], size: int | None, *, declared: bool) -> bool:
    """Whether each rank has drawn a part of the data only, because its sampler shards by rank.

    Ranks whose sampler is merely random draw the same indices in another order, or indices that meet by chance.

    Args:
        draws: of W ranks, the indices of a pass in their order.
        size: samples of the data set; None where indices are not numbers below it, as geographic ones are not.
        declared: whether the samplers of all ranks say that they draw a shard, see `declares_shard`.
    """
    if declared and (size is None or max(map(len, draws)) < size):
        return True
    if all(sorted(map(repr, drawn)) == sorted(map(repr, draws[0])) for drawn in draws):
        return False
    return declared or (size is not None and _are_disjoint(draws, size))


def _are_disjoint(draws: Sequence[Sequence[Any]], size: int) -> bool:
    """Whether ranks have drawn different numbers below `size`, each once, except for a few and not by chance."""
    if not all(isinstance(index, int) and 0 <= index < size for drawn in draws for index in drawn):
        return False
    parts = [set(drawn) for drawn in draws]
    lengths = [len(drawn) for drawn in draws]
    if [len(part) for part in parts] != lengths:
        return False  # drawn with replacement
    union = len(set[int]().union(*parts))
    if max(lengths) - min(lengths) <= 1 and union == size and sum(lengths) < size + len(draws):
        return True  # all of the data in equal parts, as far as its size can be divided
    return _log_chance_of_overlap(parts, size) < log(_CHANCE)


def _log_chance_of_overlap(parts: Sequence[set[int]], size: int) -> float:
    """The logarithm of an upper bound of the chance that random parts of `size` indices overlap as little as these do.

    It is Chernoff's bound for drawing without replacement (Hoeffding, 1963), rank by rank: of `n` indices of a rank a
    fraction `b` lies in the union of those before, where a fraction `a` is expected, with a chance of at most
    `exp(-n * KL(b, a))`.
    """
    seen = set[int]()
    total = 0.0
    for part in parts:
        if part and seen:
            expected, found = len(seen) / size, len(part & seen) / len(part)
            if found < expected:
                total -= len(part) * (_log_term(found, expected) + _log_term(1 - found, 1 - expected))
        seen |= part
    return total


def _log_term(p: float, q: float) -> float:
    return p * log(p / q) if p else 0.0
