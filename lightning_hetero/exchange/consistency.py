"""Checks at the start that all ranks agree on the job, and lists the differences, which would make ranks hang later."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from zlib import crc32

from torch import nn

from lightning_hetero.exchange.groups import RankGroup


def package_version() -> str:
    """The version of this package; "(not installed)" if it runs from a source tree."""
    try:
        return version("lightning-hetero")
    except PackageNotFoundError:
        return "(not installed)"


def facts(module: nn.Module, precision: str) -> dict[str, Any]:
    """What must be the same on all ranks before the first step."""
    return {
        "version of lightning-hetero": package_version(),
        "version of torch": version("torch"),
        "precision": precision,
        "module": type(module).__name__,
        **{f"shape of {name}": tuple(parameter.shape) for name, parameter in module.named_parameters()},
    }


def job_facts(module: nn.Module, precision: str) -> dict[str, Any]:
    """What must be equal for another run's step times to be valid in this one, besides devices and the global batch."""
    shapes = repr([(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()])
    return {"module": type(module).__name__, "parameters": crc32(shapes.encode()), "precision": precision}


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each fact that differs between ranks, with its values and the ranks that have them."""
    lines = []
    for name in dict.fromkeys(name for mapping in facts for name in mapping):
        holders = defaultdict[str, list[int]](list)
        for rank, mapping in enumerate(facts):
            holders[repr(mapping.get(name, "missing"))].append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
            lines.append(f"{name}: {values}")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def require_equal(group: RankGroup, facts: Mapping[str, Any], topic: str) -> None:
    """Check that `facts`, this rank's values by name, are equal on all ranks; all ranks must call this together.

    Raises:
        ValueError: they differ; `topic` says what they are about. The message is the same on every rank.
    """
    lines = differences(group.gather(dict(facts)))
    if lines:
        raise ValueError(f"the ranks don't agree on {topic}; " + "; ".join(lines) + ". Make them equal on every rank.")
