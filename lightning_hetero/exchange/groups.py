"""The few exchanges between ranks, over a gloo group of their own.

They never share a group with the gradients: a rank that goes astray meets the others here, in an exchange whose
rows say where each of them stands, instead of in a gradient bucket that waits for ever.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

T = TypeVar("T")


def row_in_table(row: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """A table of zeros in which one row is that of `rank`, (W, columns).

    Adding zeros to a row leaves it as it is. So the sum of all ranks' tables holds the rows of all ranks: it is a
    gather that needs one buffer only.
    """
    table = row.new_zeros((world_size, len(row)))  # (W, columns)
    table[rank] = row
    return table


def gather_rows(row: torch.Tensor, rank: int, world_size: int, total: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """The rows of all ranks, (W, columns), on the device of `row`.

    Args:
        row: this rank's, (columns,); equally long on all ranks.
        rank: this rank.
        world_size: W.
        total: adds a tensor up over all ranks, in place.
    """
    table = row_in_table(row, rank, world_size)
    total(table)
    return table


class PendingRows:
    """Rows that are on their way; see `RankGroup.start`."""

    def __init__(self, table: torch.Tensor, work: dist.Work | None) -> None:
        self._table = table
        self._work = work

    PATIENCE = timedelta(seconds=5)
    """How long to wait before asking whether it makes sense to wait on."""

    def wait(self, still_makes_sense: Callable[[], None] = lambda: None) -> npt.NDArray[np.float64]:
        """Rows of all ranks, (W, columns); blocks until the slowest rank has sent its own.

        Args:
            still_makes_sense: called now and then while waiting; raises where the others will never send theirs.
        """
        work, self._work = self._work, None
        while work is not None:
            try:
                work.wait(self.PATIENCE)
            except RuntimeError:
                if work.is_completed():  # it has failed, or has come to its end just after patience did
                    work.wait()
                    break
                still_makes_sense()
            else:
                break
        return self._table.numpy()


class RankGroup:
    """RankGroup of numbers and small objects between all ranks.

    Args:
        rank: this rank.
        world_size: W.
        columns: numbers in a row of `start`.
        timeout: how long an exchange may wait for a rank.
    """

    def __init__(self, rank: int, world_size: int, columns: int, timeout: timedelta | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
            self._group = group

    def start(self, row: Sequence[float]) -> PendingRows:
        """Send this rank's row and receive everybody's, without waiting."""
        table = row_in_table(torch.tensor(row, dtype=torch.float64), self.rank, self.world_size)
        work = None
        if self._group is not None:
            work = dist.all_reduce(table, group=self._group, async_op=True)
        return PendingRows(table, work)

    def table(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """The rows of all ranks, (W, numbers); all ranks give equally many, and wait for each other."""
        own = torch.tensor(row, dtype=torch.float64)
        rows = [own]
        if self._group is not None:
            rows = [torch.empty_like(own) for _ in range(self.world_size)]
            dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows).numpy()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set on any rank; all ranks give equally many."""
        if self._group is None:
            return list(flags)
        table = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in table.tolist()]

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
            ValueError: what it raised there.
        """
        outcome: tuple[T | None, str] = (None, "")
        if self.rank == 0:
            try:
                outcome = (call(), "")
            except ValueError as error:
                outcome = (None, str(error))
        result, problem = self.broadcast(outcome)
        if problem:
            raise ValueError(problem)
        return cast("T", result)


def total(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Add a tensor up over all ranks, in place; by default over the group of the gradients, which knows the device."""
    dist.all_reduce(tensor, group=group)


def own_total(timeout: timedelta | None) -> Callable[[torch.Tensor], None]:
    """The same over a group of its own, so that its exchanges keep no order with those of gradients.

    All ranks have to call this; the group has the backend of the default one.
    """
    group = dist.new_group(timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return partial(total, group=group)
