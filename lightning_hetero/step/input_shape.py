"""What the samples of a batch look like, to recognise a run on other data than an earlier one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def input_shape(batch: Any) -> str:
    """Type and shape of all tensors in a batch, but for their first dimension, such as ``"float32 (13, 64, 64)"``.

    Local batches of different sizes give the same text: it has each type and shape once, in the order of the batch.

    Args:
        batch: tensors in any nesting of mappings, lists and tuples. Other things and 0-d tensors do not count.
    """
    tensors = (tensor for tensor in _tensors(batch) if tensor.ndim > 0)
    texts = (f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape[1:])}" for tensor in tensors)
    return ", ".join(dict.fromkeys(texts))


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
