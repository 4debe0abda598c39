"""Checks that all ranks agree: at the start on the job, and later on the shapes of what they exchange."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from zlib import crc32

import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.exchange.calls import OF_USER, Call, listed, numbered
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
            values = ", ".join(f"{value} on {numbered(ranks)}" for value, ranks in holders.items())
            lines.append(f"{name}: {values}")
    return lines


def require_equal(group: RankGroup, facts: Mapping[str, Any], topic: str) -> None:
    """Check that `facts`, this rank's values by name, are equal on all ranks; all ranks must call this together.

    Raises:
        ValueError: they differ; `topic` says what they are about. The message is the same on every rank.
    """
    lines = differences(group.gather(dict(facts)))
    if lines:
        raise ValueError(f"the ranks don't agree on {topic}; " + "; ".join(lines) + ". Make them equal on every rank.")


_MOST_DIMENSIONS = 16
"""Of a tensor whose shape is compared, so that rows are equally long; of the others only their product is."""


def require_same_call(group: RankGroup, name: str, tensor: Tensor | None, subgroup: Any) -> None:
    """Check that all ranks make a call over another process group, before they do.

    Args:
        group: of all ranks.
        name: of the call.
        tensor: what it takes, if that has to have the same shape and type on all ranks.
        subgroup: its process group. One that the user has made may be of some ranks only, and nothing is checked.

    Raises:
        ValueError: the tensors differ, the same on all ranks.
        UnmatchedCallError: not all ranks make the call.
    """
    if subgroup is not None and subgroup is not dist.group.WORLD:
        return
    call = group.waits.call(name, OF_USER)
    if tensor is None:
        group.meet(call)
    else:
        _require_equal_shapes(group, tensor, call)


def _require_equal_shapes(group: RankGroup, tensor: Tensor, call: Call) -> None:
    """Check that a tensor has the same shape and type on all ranks.

    Raises:
        ValueError: it doesn't, the same on all ranks.
        UnmatchedCallError: not all ranks make the call.
    """
    shape = tensor.shape[:_MOST_DIMENSIONS]
    padding = [0.0] * (_MOST_DIMENSIONS - len(shape))
    code = crc32(str(tensor.dtype).encode())
    rows = group.start([code, tensor.numel(), len(shape), *shape, *padding], call).wait().astype(int)  # (W, 19)
    if len({tuple(row) for row in rows}) == 1:
        return
    shapes = [tuple(row[3 : 3 + row[2]].tolist()) for row in rows]
    what, values = "shapes", [str(shape) for shape in shapes]
    if len(set(shapes)) == 1:
        what, values = "types", [str(tensor.dtype) if row[0] == code else "another" for row in rows]
    each = listed([f"{value} on {group.waits.name(rank)}" for rank, value in enumerate(values)])
    raise ValueError(
        f"{call.text} needs tensors of equal {what} on all ranks, but gets {each}. Ranks have batches of different "
        "sizes: keep values in a torchmetrics object with a list state, or gather them with "
        "torch.distributed.all_gather_object or gather_object, which take any size"
    )
