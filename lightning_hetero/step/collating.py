"""How many samples a rank's batch holds: what its collate function was given, less what that has left out."""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import default_collate

from lightning_hetero.step.batch_contents import has_no_samples, sample_shapes, sequences_of, tensors_of


class Collated(NamedTuple):
    """A batch as a loader's worker returns it; a named tuple, so that torch can pin its memory."""

    batch: Any
    samples: int  # 0 if nothing is left of them


class _NoSamples:
    """Stands for a batch without samples where a rank has had no other batch yet."""

    def __repr__(self) -> str:
        return "<a batch of which the collate function has left nothing>"


NO_SAMPLES = _NoSamples()


class CountingCollate:
    """Calls a loader's collate function, and counts the samples that it keeps.

    It is given what the data set returned for `n` indices. Samples that are None don't count. It has kept m < n if the
    batch has no list of length n, but one of m samples, or of a tensor of each; or if tensors of samples were stacked
    along the first dimension, which has length m in all of them; or if that is the first dimension of all tensors, and
    no other is n. Otherwise nothing is seen to be left out.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    @property
    def may_drop(self) -> bool:
        """Whether samples may be left out; torch's own function has no way to."""
        return self.collate is not default_collate

    def __call__(self, samples: Any) -> Collated:
        if not self.may_drop:
            return Collated(self.collate(samples), len(samples))
        try:
            batch = self.collate(samples)
        except Exception as error:
            if not self._fails_alike_without_samples(error):
                raise
            return Collated(None, 0)
        return Collated(batch, 0 if has_no_samples(batch) else _kept(samples, batch))

    def _fails_alike_without_samples(self, error: Exception) -> bool:
        """Whether it fails with the same error at the same place for no samples: all of these were left out."""
        try:
            self.collate([])
        except Exception as other:  # noqa: BLE001 - it is only compared
            return (type(error), str(error), _places(error)) == (type(other), str(other), _places(other))
        return False


def _places(error: Exception) -> list[tuple[str, int | None]]:
    """Files and lines from the collate function to where an error was raised."""
    return [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)[1:]]


def _kept(samples: Sequence[Any], batch: Any) -> int:
    present = [sample for sample in samples if sample is not None]
    size, tensors = len(present), list(tensors_of(batch))
    shapes = {shape for sample in present for shape in sample_shapes(sample)}
    lists = [entries for entries in sequences_of(batch) if not _are_stacked(entries, shapes)]
    if any(len(entries) == size for entries in lists):
        return size
    listed = {len(entries) for entries in lists if len(entries) < size and _are_samples(entries, present, shapes)}
    if len(listed) == 1:
        return listed.pop()
    if all(len(tensor) >= size for tensor in tensors):
        return size
    found = {tuple(tensor.shape) for tensor in tensors} - shapes  # one that is a sample's own has not been stacked
    stacked = {length for length, *shape in found if tuple(shape) in shapes}
    if not stacked and not lists and not any(size in tensor.shape for tensor in tensors):
        stacked = {len(tensor) for tensor in tensors}  # of transformed samples
    return min(size, *stacked) if len(stacked) == 1 else size


def _are_stacked(entries: Sequence[Any], shapes: set[tuple[int, ...]]) -> bool:
    """Whether the entries are parts of a batch, such as images and classes: tensors of samples, each stacked."""
    tensors = [entry for entry in entries if isinstance(entry, Tensor) and entry.ndim > 0]
    if len(tensors) < len(entries) or len({len(tensor) for tensor in tensors}) != 1:
        return False
    return any(tuple(tensor.shape[1:]) in shapes for tensor in tensors) and not any(
        tuple(tensor.shape) in shapes for tensor in tensors
    )


def _are_samples(entries: Sequence[Any], samples: Sequence[Any], shapes: set[tuple[int, ...]]) -> bool:
    """Whether a list has samples as the data set returns them, or one tensor of each."""
    if all(isinstance(entry, Tensor) for entry in entries):
        return bool(entries) and all(entry.ndim > 0 and tuple(entry.shape) in shapes for entry in entries)
    return {_structure(entry) for entry in entries} == {_structure(sample) for sample in samples}


def _structure(sample: Any) -> Any:
    """The types of what a sample consists of."""
    if isinstance(sample, Mapping):
        return type(sample), *map(str, sample)
    return (type(sample), *map(type, sample)) if isinstance(sample, list | tuple) else type(sample)


class KeptBatches(Iterator[Any]):
    """The batches of a loader whose collate function is a `CountingCollate`.

    In place of a batch without samples there is an earlier one, or if there is none the next one, so that this rank
    goes through the same layers and hooks as the others; it counts for nothing.

    Args:
        iterator: of the loader.
        record: called with the number of samples of each batch, in order.
        may_drop: see `CountingCollate`.
    """

    def __init__(self, iterator: Iterator[Collated], record: Callable[[int], None], *, may_drop: bool) -> None:
        self._iterator, self._record, self._may_drop = iterator, record, may_drop
        self._ahead: deque[Collated] = deque()  # loaded already, to stand in for an earlier batch
        self._last: Any = NO_SAMPLES

    def __next__(self) -> Any:
        batch, samples = self._ahead.popleft() if self._ahead else next(self._iterator)
        self._record(samples)
        if not samples:
            return self._stand_in()
        if self._may_drop:
            self._last = batch
        return batch

    def _stand_in(self) -> Any:
        if self._last is not NO_SAMPLES:
            return self._last
        while not any(samples for _, samples in self._ahead):
            try:
                self._ahead.append(next(self._iterator))
            except StopIteration:
                return NO_SAMPLES
        return next(batch for batch, samples in self._ahead if samples)
