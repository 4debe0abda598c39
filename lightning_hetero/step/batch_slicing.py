"""Cutting a batch into smaller ones, and putting what came of them together."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class CannotCutError(TypeError):
    """A batch is no collection of things that have one entry a sample."""


def part(batch: Any, size: int, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch; tensors are views, not copies.

    Tensors and arrays are cut along their first dimension, sequences that have one entry a sample between their
    entries. The batch itself, mappings, dataclasses and other sequences are collections of such things. Numbers,
    strings and tensors without dimensions belong to the batch as a whole.

    Args:
        batch: of `size` samples.
        size: its samples.
        start: the first sample of the part.
        stop: the sample after the last.

    Raises:
        CannotCutError: something in it has not one entry a sample, or may be read in two ways.
    """
    return _part(batch, size, slice(start, stop), top=True)


def _part(value: Any, size: int, span: slice, *, top: bool = False) -> Any:
    if value is None or isinstance(value, str | bytes | int | float | complex | np.number):
        return value
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim == 0:
            return value
        if len(value) != size:
            raise CannotCutError(f"a tensor of shape {tuple(value.shape)} is in it, and not {size} entries long")
        return value[span]
    if isinstance(value, Mapping):
        made = {key: _part(entry, size, span) for key, entry in value.items()}
        return made if type(value) is dict else _same_type(value, made)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _part(getattr(value, f.name), size, span) for f in fields(value) if f.init})
    if isinstance(value, Sequence):
        return _of_sequence(value, size, span, top=top)
    raise CannotCutError(f"an object of type {type(value).__name__} is in it")


def _of_sequence(value: Sequence[Any], size: int, span: slice, *, top: bool) -> Any:
    try:
        inside: list[Any] | None = [_part(entry, size, span) for entry in value]
    except CannotCutError:
        inside = None
    # Numbers and strings by themselves tell nothing of the samples.
    collects = inside is not None and any(_has_samples(entry) for entry in value)
    one_each = len(value) == size
    if one_each and not collects:
        return _same_type(value, list(value[span]))
    if inside is not None and (top or not one_each):
        return _same_type(value, inside)
    raise CannotCutError(
        f"a {type(value).__name__} of {len(value)} entries is in it, "
        + ("which may be one a sample, or hold all samples each" if one_each else f"not one for each of {size} samples")
    )


def _has_samples(value: Any) -> bool:
    """Whether there is a tensor or an array with dimensions in it."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    if isinstance(value, Mapping):
        return any(map(_has_samples, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return any(_has_samples(getattr(value, f.name)) for f in fields(value))
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and any(map(_has_samples, value))


def _same_type(value: Any, made: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*made)
    try:
        return type(value)(made)
    except TypeError:
        raise CannotCutError(f"a {type(value).__name__} is in it, which can't be made of its entries") from None


def halves(size: int, smallest: int) -> tuple[int, int] | None:
    """Two nearly equal parts of at least `smallest` samples each; None where there are none."""
    return (size - size // 2, size // 2) if size // 2 >= smallest else None


def joined(outputs: Sequence[Any], sizes: Sequence[int], loss: Tensor) -> Any:
    """What a training step would have returned for the batch, of what it returned for its parts.

    Args:
        outputs: of P parts: a loss, or a mapping with the key "loss".
        sizes: P numbers of samples.
        loss: of the whole batch.

    Returns:
        The loss, or a dict with it: entries that have one row a sample are put one after the other, other tensors
            become their mean over the samples, and what is neither is that of the last part.
    """
    if not isinstance(outputs[0], Mapping):
        return loss
    result: dict[str, Any] = {}
    for key in outputs[-1]:
        values = [output[key] for output in outputs if key in output]
        tensors = len(values) == len(sizes) and all(isinstance(value, Tensor) for value in values)
        if key == "loss":
            result[key] = loss
        elif tensors and all(value.ndim and len(value) == size for value, size in zip(values, sizes, strict=True)):
            result[key] = torch.cat([value.detach() for value in values])
        elif tensors and values[0].is_floating_point() and len({value.shape for value in values}) == 1:
            rows = (value.detach() * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True))
            result[key] = torch.stack(list(rows)).sum(0)
        else:
            result[key] = values[-1]
    return result
