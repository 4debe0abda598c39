"""Collective calls between all ranks, over a separate gloo process group.

They never share a group with the gradients: a rank that is out of step with the others joins them here, in a call whose
rows say where each rank is, instead of in a gradient bucket that waits forever.
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
    """A collective call has failed: another rank has exited, or does not answer within the timeout."""


def _row_in_table(row: Tensor, rank: int, world_size: int) -> Tensor:
    """A table, (W, columns), of zeros except for the row of `rank`: the sum of all ranks' tables has all rows."""
    table = row.new_zeros((world_size, len(row)))  # (W, columns)
    table[rank] = row
    return table


def gather_rows(row: Tensor, rank: int, world_size: int, all_reduce_sum: Callable[[Tensor], None]) -> Tensor:
    """The rows of all ranks, (W, columns), from this rank's, (columns,); `all_reduce_sum` works in place."""
    table = _row_in_table(row, rank, world_size)
    all_reduce_sum(table)
    return table


class PendingRows:
    """Rows of all ranks that are still being exchanged; see `RankGroup.start`."""

    CHECK_INTERVAL = timedelta(seconds=5)
    """How long to wait before each `check_others`. Chosen: far longer than the wait in a normal step."""

    def __init__(self, table: Tensor, work: dist.Work | None) -> None:
        self._table = table
        self._work = work

    def wait(self, check_others: Callable[[], None] = lambda: None) -> npt.NDArray[np.float64]:
        """The rows of all ranks, (W, columns); blocks until the slowest rank has sent its row.

        Args:
            check_others: called every `CHECK_INTERVAL` while waiting; raises if another rank will never send its row.

        Raises:
            LostConnectionError: a rank has exited, or has not sent its row within the group's timeout.
        """
        work, self._work = self._work, None
        while work is not None and not _completes_within(work, self.CHECK_INTERVAL):
            check_others()
        return self._table.numpy()


def _completes_within(work: dist.Work, timeout: timedelta) -> bool:
    """Wait for a collective call for at most `timeout`; returns whether it has succeeded by then."""
    try:
        work.wait(timeout)
    except RuntimeError:
        if not work.is_completed():
            return False
        try:
            work.wait()  # it has failed, or has succeeded just after the timeout
        except RuntimeError as error:
            raise LostConnectionError(str(error)) from None
    return True


class RankGroup:
    """Collective calls by which all ranks exchange numbers and small objects.

    All ranks must construct it, and call its methods in the same order. A call waits up to `timeout` for other ranks.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group: dist.ProcessGroup | None = _new_group("gloo", timeout) if world_size > 1 else None

    def start(self, row: Sequence[float]) -> PendingRows:
        """Start to exchange this rank's row for those of all ranks, without waiting; rows must be equally long."""
        table = _row_in_table(torch.tensor(row, dtype=torch.float64), self.rank, self.world_size)
        work = dist.all_reduce(table, group=self._group, async_op=True) if self._group is not None else None
        return PendingRows(table, work)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any rank has set it; all ranks must pass equally many."""
        table = self.start(flags).wait()  # (W, flags)
        return [bool(column.any()) for column in table.T]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self._group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        result: T = values[0]
        return result

    def from_rank_zero(self, call: Callable[[], T]) -> T:
        """Run `call` on rank 0 only, and return its result on all ranks.

        Raises:
            Exception: what it raised on rank 0. On the other ranks an exception of the same type and text, if that is a
                builtin type that takes only a message; otherwise a RuntimeError that names the type.
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
"""Exception types that can be rebuilt from their message alone."""


def _rebuilt(name: str, text: str) -> Exception:
    """An exception of another rank, from the name of its type and its text."""
    relayed = next((kind for kind in _RELAYED if kind.__name__ == name), None)
    return relayed(text) if relayed is not None else RuntimeError(f"{name}: {text}")


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum a tensor over all ranks, in place; by default in the default group, whose backend supports its device."""
    dist.all_reduce(tensor, group=group)


def all_reduce_in_own_group(timeout: timedelta | None) -> Callable[[Tensor], None]:
    """An `all_reduce_sum` over a group of its own, so that its calls need not be ordered with those of gradients.

    All ranks must call this; the group has the same backend as the default one.
    """
    return partial(all_reduce_sum, group=_new_group(None, timeout))


def _new_group(backend: str | None, timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return group
