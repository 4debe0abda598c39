"""The contents of a batch of any type: its tensors, the number of samples, and their shape."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from zlib import crc32

import numpy as np
from torch import Tensor


def sample_count(batch: Any) -> int:
    """Number of samples in a batch of which nothing else is known: the length of its first tensor.

    Raises:
        TypeError: the batch has no tensor with a batch dimension.
    """
    for tensor in tensors_of(batch):
        return len(tensor)
    raise TypeError(
        f"there is no tensor with a batch dimension in a batch of type {type(batch).__name__}, so its samples can't be "
        "counted: give the module a loss_count(batch), or HeteroStrategy a loss_count"
    )


def sample_count_or_one(batch: Any) -> int:
    """The same, as a weight that need not be exact: 1 where samples can't be counted."""
    try:
        return sample_count(batch)
    except TypeError:
        return 1


def has_no_samples(batch: Any) -> bool:
    """Whether a batch is None, an empty collection, or a collection of only empty tensors and collections."""
    if batch is None:
        return True
    if isinstance(batch, Tensor | np.ndarray):
        return batch.ndim > 0 and not len(batch)
    if isinstance(batch, Mapping):
        return all(map(has_no_samples, batch.values()))
    return isinstance(batch, list | tuple) and all(map(has_no_samples, batch))


def sample_shapes(sample: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of all tensors, arrays and numbers in a sample, as the data set returns it."""
    if isinstance(sample, Tensor | np.ndarray | np.generic):
        yield tuple(sample.shape)
    elif isinstance(sample, int | float | complex):
        yield ()
    elif isinstance(sample, Mapping):
        for value in sample.values():
            yield from sample_shapes(value)
    elif isinstance(sample, list | tuple):
        for value in sample:
            yield from sample_shapes(value)
    else:
        yield from (tuple(tensor.shape) for tensor in tensors_of(sample))


def sequences_of(batch: Any) -> Iterator[list[Any]]:
    """The entries of each list and tuple in a batch, also of those inside others."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from sequences_of(value)
    elif isinstance(batch, list | tuple):
        yield list(batch)
        for value in batch:
            yield from sequences_of(value)


def input_shape(batch: Any) -> str:
    """Dtype and shape, without the batch dimension, of all tensors in a batch, such as ``"float32 (13, 64, 64)"``.

    It is the same for local batches of any size: each dtype and shape appears once, in the order of the batch.
    """
    texts = (f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape[1:])}" for tensor in tensors_of(batch))
    return ", ".join(dict.fromkeys(texts))


def shape_number(shape: str) -> int:
    """A checksum of an input shape for messages, exact as a float; 0 for an unknown shape."""
    return crc32(shape.encode())


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch that have a batch dimension."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes | np.ndarray | Iterator):
        for value in batch:  # iterators are excluded above, since this would exhaust them
            yield from tensors_of(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors_of(getattr(batch, field.name))
    elif hasattr(batch, "__dict__"):
        yield from (value for value in vars(batch).values() if isinstance(value, Tensor) and value.ndim)
