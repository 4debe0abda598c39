"""Collective calls between all ranks, over a separate gloo process group.

They never share a group with the gradients: a rank that is out of step with the others joins them here, in a call whose
rows say where each rank is, instead of in a gradient bucket that waits forever.
"""

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.exchange.calls import TEXT_COLUMNS, Call, Place, pack, unmatched, unpack
from lightning_hetero.exchange.waits import Waits

T = TypeVar("T")


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

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait = wait
        self._table: Tensor | None = None

    def wait(self) -> npt.NDArray[np.float64]:
        """The rows of all ranks, (W, columns), shorter ones filled up with zeros; blocks until the slowest has come.

        Raises:
            UnmatchedCallError: ranks make different calls.
            LostConnectionError: a rank has exited or failed.
            WaitTimeoutError: a rank has not sent its row within the group's timeout.
        """
        if self._table is None:
            self._table = self._wait()
        return self._table.numpy()


_HEAD = 3 + TEXT_COLUMNS
"""What each row begins with: the checksum of the call's name, its kind, the number of values; and its text."""

_VALUES = 80
"""How many values are sent with the head; more take a second exchange. Chosen: the messages of a step have fewer,
unless a step logs more than a dozen values."""


class RankGroup:
    """Collective calls by which all ranks exchange numbers and small objects.

    All ranks must construct it, and call its methods in the same order. A call waits up to the group's timeout for
    other ranks, and looks meanwhile whether they can still come. Each begins with an exchange of the same size, which
    says what the call is: so where ranks make different calls, all of them raise the same error.

    Args:
        rank: this rank.
        world_size: W.
        timeout: of the process group.
        waits: of this rank; without it, a wait ends with the timeout.
        channel: tells several groups of the same ranks apart.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: timedelta | None,
        waits: Waits | None = None,
        channel: str = "ranks",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.waits = waits or Waits(rank, world_size, "", None, timeout)
        self._channel = channel
        self._group: dist.ProcessGroup | None = _new_group("gloo", timeout) if world_size > 1 else None

    def start(self, row: Sequence[float], call: Call | str = "an exchange of numbers") -> PendingRows:
        """Start to exchange this rank's row for those of all ranks, without waiting."""
        if self._group is None:
            return PendingRows(lambda: torch.tensor([list(row)], dtype=torch.float64))
        call = self._named(call)
        values = list(row)
        head = [float(call.checksum), float(call.kind), float(len(values)), *pack(call.text)]
        first = torch.zeros(_HEAD + _VALUES, dtype=torch.float64)  # (columns,)
        first[: _HEAD + min(len(values), _VALUES)] = torch.tensor([*head, *values[:_VALUES]], dtype=torch.float64)
        table = _row_in_table(first, self.rank, self.world_size)
        number = self.waits.begin(self._channel)
        work = dist.all_reduce(table, group=self._group, async_op=True)

        def wait() -> Tensor:
            self.waits.complete(work, call, self._channel, number)
            self._require_same(table)
            columns = int(table[:, 2].max())  # of the longest row
            if columns <= _VALUES:
                return table[:, _HEAD : _HEAD + columns]
            more = torch.zeros(columns - _VALUES, dtype=torch.float64)
            more[: max(0, len(values) - _VALUES)] = torch.tensor(values[_VALUES:], dtype=torch.float64)
            rest = _row_in_table(more, self.rank, self.world_size)
            self._complete(lambda: dist.all_reduce(rest, group=self._group, async_op=True), call)
            return torch.cat([table[:, _HEAD:], rest], dim=1)

        return PendingRows(wait)

    def gather(self, value: T, call: Call | str = "a gathering of values") -> list[T]:
        """The values of all ranks, in rank order."""
        if self._group is None:
            return [value]
        call = self._named(call)
        own = _bytes_of(value)
        sizes = [int(size) for size in self.start([len(own)], call).wait()[:, 0]]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        self._complete(lambda: dist.all_gather(parts, padded, group=self._group, async_op=True), call)
        return [_value_of(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def any_of(self, flags: Sequence[bool], call: Call | str = "an exchange of flags") -> list[bool]:
        """For each flag, whether any rank has set it; all ranks must pass equally many."""
        table = self.start(flags, call).wait()  # (W, flags)
        return [bool(column.any()) for column in table.T]

    def broadcast(self, value: T, call: Call | str = "a broadcast of rank 0's value") -> T:
        """Rank 0's value, on all ranks."""
        if self._group is None:
            return value
        call = self._named(call)
        data = _bytes_of(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = int(self.start([len(data)], call).wait()[0, 0])
        data = data if self.rank == 0 else torch.empty(size, dtype=torch.uint8)
        self._complete(lambda: dist.broadcast(data, src=0, group=self._group, async_op=True), call)
        return value if self.rank == 0 else cast("T", _value_of(data))

    def meet(self, call: Call) -> None:
        """Wait until all ranks make a call that is not this group's."""
        self.start((), call).wait()

    def _named(self, call: Call | str) -> Call:
        return self.waits.call(call) if isinstance(call, str) else call

    def _complete(self, begin: Callable[[], dist.Work | None], call: Call) -> None:
        """Make a further exchange of a call, and wait for it."""
        number = self.waits.begin(self._channel)
        work = begin()
        assert work is not None, "this rank is in the group of all ranks"
        self.waits.complete(work, call, self._channel, number)

    def _require_same(self, table: Tensor) -> None:
        """Raise an UnmatchedCallError where the heads of the ranks' rows, (W, columns), are of different calls."""
        if len(set(table[:, 0].tolist())) == 1:
            return
        rows = table.tolist()
        raise unmatched(
            [Place(self.waits.name(rank), unpack(row[3:_HEAD]), int(row[1])) for rank, row in enumerate(rows)]
        )

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


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum a tensor over all ranks, in place, in the default group, whose backend supports its device."""
    dist.all_reduce(tensor)


def all_reduce_in_own_group(timeout: timedelta | None, waits: Waits, call: str) -> Callable[[Tensor], None]:
    """An `all_reduce_sum` over a group of its own, so that its calls need not be ordered with those of gradients.

    All ranks must call this; the group has the same backend as the default one. `call` names it in errors.
    """
    group = _new_group(None, timeout)

    def in_own_group(tensor: Tensor) -> None:
        number = waits.begin(call)
        work = dist.all_reduce(tensor, group=group, async_op=True)
        assert work is not None, "this rank is in the group of all ranks"
        if tensor.device.type == "cuda":
            work.wait()  # the device's stream waits, not the host
        else:
            waits.complete(work, waits.call(call), call, number)

    return in_own_group


def _bytes_of(value: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)  # (bytes,)


def _value_of(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())  # noqa: S301 - another rank of this job has sent it


def _new_group(backend: str | None, timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return group
