"""What a batch holds, whatever it is made of: its tensors, the number of its samples, and what these look like."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from zlib import crc32

import numpy as np
from torch import Tensor


def sample_count(batch: Any, drawn: int | None = None) -> int:
    """Number of samples in a batch: the length of its tensors.

    Where these differ, as in batches of boxes, it is the number of samples that were drawn for it, if that is known.
    Augmentations may make more of them, but all tensors then grow alike.

    Raises:
        TypeError: there is no tensor with a batch dimension in it, and `drawn` is not known.
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
    """Type and shape of all tensors in a batch, but for their first dimension, such as ``"float32 (13, 64, 64)"``.

    Local batches of different sizes give the same text: it has each type and shape once, in the order of the batch.
    """
    texts = (f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape[1:])}" for tensor in _tensors(batch))
    return ", ".join(dict.fromkeys(texts))


def shape_number(shape: str) -> int:
    """A number that stands for an input shape in messages, exact as a float; 0 for an unknown one."""
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
        for value in batch:  # but nothing that would be used up by it
            yield from _tensors(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _tensors(getattr(batch, field.name))
    elif hasattr(batch, "__dict__"):
        yield from (value for value in vars(batch).values() if isinstance(value, Tensor) and value.ndim)
