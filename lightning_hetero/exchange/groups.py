"""Collective calls between all ranks, over a gloo group of their own.

They never share a group with the gradients: a rank that has lost step with the others meets them here, in a call whose
rows say where each of them is, instead of in a gradient bucket that waits forever.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class LostConnectionError(RuntimeError):
    """A call to the other ranks has failed: one of them has ended, or does not answer within the timeout."""


def _row_in_table(row: Tensor, rank: int, world_size: int) -> Tensor:
    """A table of zeros but for the row of `rank`, (W, columns): the sum of all ranks' tables gathers all rows."""
    table = row.new_zeros((world_size, len(row)))  # (W, columns)
    table[rank] = row
    return table


def gather_rows(row: Tensor, rank: int, world_size: int, total: Callable[[Tensor], None]) -> Tensor:
    """The rows of all ranks, (W, columns), from each rank's, (columns,); `total` adds up over all ranks, in place."""
    table = _row_in_table(row, rank, world_size)
    total(table)
    return table


class PendingRows:
    """Rows that are on their way; see `RankGroup.start`."""

    PATIENCE = timedelta(seconds=5)
    """How long to wait before asking whether to go on waiting; far longer than the waiting of a usual step."""

    def __init__(self, table: Tensor, work: dist.Work | None) -> None:
        self._table = table
        self._work = work

    def wait(self, check_others: Callable[[], None] = lambda: None) -> npt.NDArray[np.float64]:
        """Rows of all ranks, (W, columns); blocks until the slowest rank has sent its own.

        Args:
            check_others: called now and then while waiting; raises where the others will never send theirs.

        Raises:
            LostConnectionError: a rank has ended, or has not sent its row within the group's timeout.
        """
        work, self._work = self._work, None
        while work is not None and not _is_over(work, self.PATIENCE):
            check_others()
        return self._table.numpy()


def _is_over(work: dist.Work, patience: timedelta) -> bool:
    """Wait for a call to the other ranks, but not for longer than `patience`; whether it has ended well."""
    try:
        work.wait(patience)
    except RuntimeError:
        if not work.is_completed():
            return False
        try:
            work.wait()  # it has failed, or has ended just after the time was up
        except RuntimeError as error:
            raise LostConnectionError(str(error)) from None
    return True


class RankGroup:
    """All ranks, as they exchange numbers and small objects with each other.

    All ranks have to make it, and to call its methods in the same order. A call waits for a rank for up to `timeout`.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group: dist.ProcessGroup | None = _new_group("gloo", timeout) if world_size > 1 else None

    def start(self, row: Sequence[float]) -> PendingRows:
        """Send this rank's row and receive those of all ranks, without waiting; all ranks give equally many numbers."""
        table = _row_in_table(torch.tensor(row, dtype=torch.float64), self.rank, self.world_size)
        work = dist.all_reduce(table, group=self._group, async_op=True) if self._group is not None else None
        return PendingRows(table, work)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set on any rank; all ranks give equally many."""
        table = self.start(flags).wait()  # (W, flags)
        return [bool(column.any()) for column in table.T]

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self._group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        result: T = values[0]
        return result

    def from_rank_zero(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on all ranks; it runs there only.

        Raises:
            Exception: what it raised there. On the other ranks one of the same type and text, where the type is one of
                Python's own that is made of a text; otherwise a RuntimeError that names the type.
        """
        if self.rank:
            result, error = self.broadcast(cast("tuple[T, tuple[str, str] | None]", None))
            if error is not None:
                raise _rebuilt(*error)
            return result
        try:
            result = call()
        except Exception as error:
            self.broadcast((None, (type(error).__name__, str(error))))
            raise
        self.broadcast((result, None))
        return result


_RELAYED = (ValueError, TypeError, RuntimeError, OSError, FileNotFoundError, PermissionError, NotADirectoryError)
"""Exceptions that are the same again when they are made from their text alone."""


def _rebuilt(name: str, text: str) -> Exception:
    """An exception of another rank, from the name of its type and its text."""
    relayed = next((kind for kind in _RELAYED if kind.__name__ == name), None)
    return relayed(text) if relayed is not None else RuntimeError(f"{name}: {text}")


def total(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Add a tensor up over all ranks, in place; by default over the group of the gradients, which knows the device."""
    dist.all_reduce(tensor, group=group)


def own_total(timeout: timedelta | None) -> Callable[[Tensor], None]:
    """A `total` over a group of its own, so that its calls need no order among those of gradients.

    All ranks have to call this; the group has the backend of the default one.
    """
    return partial(total, group=_new_group(None, timeout))


def _new_group(backend: str | None, timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return group
