"""Checks that all ranks agree on the job when it starts: what differs is listed, where ranks would hang later."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from zlib import crc32

import torch
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
    """What has to be the same for another run's step times to be valid here, beside devices and the global batch."""
    shapes = repr([(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()])
    return {"module": type(module).__name__, "parameters": crc32(shapes.encode()), "precision": precision}


def machine(device: torch.device) -> list[Any]:
    """What distinguishes a rank's device from others."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [platform.node(), name, torch.get_num_threads()]


def differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a fact on which ranks differ, with the values and the ranks that hold them.

    Args:
        facts: one mapping a rank, from what is compared to its value.
    """
    lines = []
    for name in dict.fromkeys(name for mapping in facts for name in mapping):
        holders: dict[str, list[int]] = {}
        for rank, mapping in enumerate(facts):
            holders.setdefault(repr(mapping.get(name, "missing")), []).append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
            lines.append(f"{name}: {values}")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def require(group: RankGroup, facts: Mapping[str, Any], topic: str) -> None:
    """Compare `facts` over all ranks.

    Args:
        group: of all ranks, which have to call this together.
        facts: from what is compared to this rank's value.
        topic: what they are about, for the error.

    Raises:
        ValueError: they differ; the same sentence on every rank.
    """
    lines = differences(group.gather(dict(facts)))
    if lines:
        raise ValueError(f"the ranks don't agree on {topic}; " + "; ".join(lines) + ". Make them equal on every rank.")
