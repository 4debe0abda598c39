"""Checks at the start that all ranks agree on the job, and lists what differs: otherwise ranks would hang later."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from zlib import crc32

from torch import nn

from lightning_hetero.exchange.groups import RankGroup


def release() -> str:
    """The version of this package; "(not installed)" in a source tree that was not installed."""
    try:
        return version("lightning-hetero")
    except PackageNotFoundError:
        return "(not installed)"


def facts(module: nn.Module, precision: str) -> dict[str, Any]:
    """What has to be the same on all ranks before the first step."""
    return {
        "version of lightning-hetero": release(),
        "version of torch": version("torch"),
        "precision": precision,
        "module": type(module).__name__,
        **{f"shape of {name}": tuple(parameter.shape) for name, parameter in module.named_parameters()},
    }


def job(module: nn.Module, precision: str) -> dict[str, Any]:
    """What has to be the same for another run's step times to be valid here, besides devices and the global batch."""
    shapes = repr([(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()])
    return {"module": type(module).__name__, "parameters": crc32(shapes.encode()), "precision": precision}


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each of the ranks' facts in which they differ, with the values and the ranks that hold them."""
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


def require(group: RankGroup, facts: Mapping[str, Any], topic: str) -> None:
    """Compare `facts`, from what is compared to this rank's value; all ranks have to call this together.

    Raises:
        ValueError: they differ, with `topic` saying what they are about; the same sentence on every rank.
    """
    lines = differences(group.gather(dict(facts)))
    if lines:
        raise ValueError(f"the ranks don't agree on {topic}; " + "; ".join(lines) + ". Make them equal on every rank.")
