"""Slices a batch into parts, and joins the outputs of these parts."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class CannotSliceError(TypeError):
    """A batch contains something that does not have one entry per sample."""


def slice_batch(batch: Any, size: int, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch of `size` samples; tensors are views, not copies.

    Tensors and arrays are sliced along their first dimension, and so are sequences with one entry per sample. The batch
    itself, mappings, dataclasses and other sequences are collections of such values. Numbers, strings and 0-d tensors
    belong to the batch as a whole.

    Raises:
        CannotSliceError: something in it does not have one entry per sample, or is ambiguous.
    """
    return _slice(batch, size, slice(start, stop), is_batch=True)


def _slice(value: Any, size: int, span: slice, *, is_batch: bool = False) -> Any:
    if value is None or isinstance(value, str | bytes | int | float | complex | np.number):
        return value
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim and len(value) != size:
            raise CannotSliceError(f"a tensor of shape {tuple(value.shape)} is in it, and not {size} entries long")
        return value[span] if value.ndim else value
    if isinstance(value, Mapping):
        entries = {key: _slice(entry, size, span) for key, entry in value.items()}
        return entries if type(value) is dict else _same_type(value, entries)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _slice(getattr(value, f.name), size, span) for f in fields(value) if f.init})
    if isinstance(value, Sequence):
        return _slice_sequence(value, size, span, is_batch=is_batch)
    raise CannotSliceError(f"an object of type {type(value).__name__} is in it")


def _slice_sequence(value: Sequence[Any], size: int, span: slice, *, is_batch: bool) -> Any:
    try:
        entries: list[Any] | None = [_slice(entry, size, span) for entry in value]
    except CannotSliceError:
        entries = None
    # A sequence of only numbers and strings is not a collection: each of them may belong to one sample.
    is_collection = entries is not None and any(_has_samples(entry) for entry in value)
    one_each = len(value) == size
    if one_each and not is_collection:
        return _same_type(value, list(value[span]))
    if entries is not None and (is_batch or not one_each):
        return _same_type(value, entries)
    raise CannotSliceError(
        f"a {type(value).__name__} of {len(value)} entries is in it, "
        + (
            "which may be one for each sample, or hold all samples each"
            if one_each
            else f"not one for each of {size} samples"
        )
    )


def _has_samples(value: Any) -> bool:
    """Whether it contains a tensor or an array with at least one dimension."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    if isinstance(value, Mapping):
        return any(map(_has_samples, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return any(_has_samples(getattr(value, f.name)) for f in fields(value))
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and any(map(_has_samples, value))


def _same_type(value: Any, entries: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*entries)
    try:
        return type(value)(entries)
    except TypeError:
        raise CannotSliceError(f"a {type(value).__name__} is in it, which can't be rebuilt from its entries") from None


def halves(size: int, smallest: int) -> tuple[int, int] | None:
    """Sizes of two nearly equal parts of at least `smallest` samples each; None if there are none."""
    return (size - size // 2, size // 2) if size // 2 >= smallest else None


def join_outputs(outputs: Sequence[Any], sizes: Sequence[int], loss: Tensor) -> Any:
    """What a training step would have returned for the batch, from what it returned for its parts.

    Tensors with one row per sample are concatenated, other tensors become their mean over the samples, and everything
    else is taken from the last part.

    Args:
        outputs: of P parts, each a loss or a mapping with the key "loss".
        sizes: P numbers of samples.
        loss: the loss of the whole batch.
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
            result[key] = torch.cat(values)
        elif tensors and values[0].is_floating_point() and len({value.shape for value in values}) == 1:
            terms = [value * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]
            result[key] = torch.stack(terms).sum(0)
        else:
            result[key] = values[-1]
    return result
