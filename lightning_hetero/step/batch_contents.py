"""The contents of a batch of any type: its tensors, the number of samples, and their shape."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from zlib import crc32

import numpy as np
from torch import Tensor


def sample_count(batch: Any, drawn: int | None = None) -> int:
    """Number of samples in a batch: the length of its tensors.

    If these differ, as in batches of boxes, it is the number of samples that the sampler drew, if that is known.
    Augmentations may multiply the samples, but then all tensors have the same length.

    Raises:
        TypeError: the batch has no tensor with a batch dimension, and `drawn` is not known.
    """
    lengths = [len(tensor) for tensor in _tensors(batch)]
    if drawn is not None and len(set(lengths)) != 1:
        return drawn
    if lengths:
        return lengths[0]
    raise TypeError(
        f"there is no tensor with a batch dimension in a batch of type {type(batch).__name__}, so its samples can't be "
        "counted: give the module a loss_count(batch), or HeteroStrategy a loss_count"
    )


def input_shape(batch: Any) -> str:
    """Dtype and shape, without the batch dimension, of all tensors in a batch, such as ``"float32 (13, 64, 64)"``.

    It is the same for local batches of any size: each dtype and shape appears once, in the order of the batch.
    """
    texts = (f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape[1:])}" for tensor in _tensors(batch))
    return ", ".join(dict.fromkeys(texts))


def shape_number(shape: str) -> int:
    """A checksum of an input shape for messages, exact as a float; 0 for an unknown shape."""
    return crc32(shape.encode())


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch that have a batch dimension."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes | np.ndarray | Iterator):
        for value in batch:  # iterators are excluded above, since this would exhaust them
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _tensors(getattr(batch, field.name))
    elif hasattr(batch, "__dict__"):
        yield from (value for value in vars(batch).values() if isinstance(value, Tensor) and value.ndim)
