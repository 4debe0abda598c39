"""A rank that fails publishes why, so that the errors of the other ranks name the cause.

An error that is only a consequence of another rank's exit is recognized by where it is raised, never by its text: a
path or a user's own message may contain any words. With gloo, errors of a lost connection are raised in these places:

- A blocking call (`all_gather`, `broadcast`, `barrier`, …) raises a plain RuntimeError within `torch.distributed`, also
  if the user makes the call, or the backward pass of a synchronized layer does. NCCL and the store have exception types
  of their own, all of them `DistError`s.
- DDP's copying of buffers calls C++ from `torch.nn.parallel.distributed`.
- Asynchronous calls raise where they are waited for: in `PendingRows.wait`, which raises a type of its own.
- The gradients' all-reduce is waited for in C++ by autograd's engine, which raises all errors of a backward pass. So
  the averaging hook records the errors of its calls.
"""

import contextlib
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from lightning_hetero.exchange.groups import LostConnectionError

T = TypeVar("T")

_RUNS = "lightning_hetero/runs"
_FAILURE = "lightning_hetero/failure/{}"

_CAUSE_TIMEOUT = timedelta(seconds=2)
"""How long to wait for the cause of a lost connection. Chosen: a rank publishes it before its connections close, so it
is usually there already; on a busy machine it may arrive later."""


def default_store() -> Store | None:
    """The key-value store of the rendezvous, which still works after a failure; None if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # There is no public access to it; without it, only the explanation of a failure is lost.
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None


def _ask_store(call: Callable[[Store], T]) -> T | None:
    """The result of `call` on the store; None if that fails, for instance after rank 0, which hosts it, has exited."""
    with contextlib.suppress(Exception):
        if (store := default_store()) is not None:
            return call(store)
    return None


def new_run() -> int:
    """A number that no earlier run of this job has had, so that a later run never sees an earlier one's failure.

    It differs between ranks; all of them must use rank 0's.
    """
    return _ask_store(lambda store: store.add(_RUNS, 1)) or 0  # without the store nothing can be published either


class CollectiveErrors:
    """Errors of collective calls that are raised elsewhere, with a traceback that doesn't show the call."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, error: BaseException) -> None:
        """Record that a collective call has failed; called from any thread, before the error is raised."""
        self._texts.append(str(error))

    def include(self, exception: BaseException) -> bool:
        """Whether an exception is one of them; C++ may have added text around the message."""
        return any(text in str(exception) for text in self._texts)


def is_secondary_failure(exception: BaseException, averaging: CollectiveErrors) -> bool:
    """Whether an exception is only a consequence of another rank's exit: a broken or timed-out connection."""
    if isinstance(exception, dist.DistError | LostConnectionError):
        return True
    if type(exception) is not RuntimeError:  # subclasses, such as OutOfMemoryError, have causes of their own
        return False
    return _is_from_collective_call(exception) or averaging.include(exception)


def _is_from_collective_call(exception: BaseException) -> bool:
    """Whether the Python code that raised, or that called the C++ code that did, makes collective calls."""
    frames = [frame for frame, _ in traceback.walk_tb(exception.__traceback__)]
    if not frames:
        return False
    module = f"{frames[-1].f_globals.get('__name__', '')}."
    if module == "torch.nn.parallel.distributed.":  # the rest of it raises errors about misuse
        return frames[-1].f_code.co_name == "_distributed_broadcast_coalesced"
    return module.startswith("torch.distributed.")


def explain(exception: BaseException, *, run: int, rank: int, device: str, averaging: CollectiveErrors) -> None:
    """Publish why this rank fails; or, if it fails because another rank has, say so in the exception's message.

    The exception's own text is never lost. A RuntimeError that is not recognized as a consequence of another rank's
    exit may still be one, since gloo raises this type everywhere: if another rank has failed before, a note says so.

    Args:
        exception: the exception that ends the run on this rank, with its traceback.
        run: the number of the run, the same on all ranks; see `new_run`.
        rank: this rank.
        device: name of its device.
        averaging: errors of the gradients' collective calls.
    """
    key = _FAILURE.format(run)
    if not is_secondary_failure(exception, averaging):
        own = f"rank {rank} ({device}) failed first: {type(exception).__name__}: {exception}"
        first = _ask_store(lambda store: store.compare_set(key, "", own).decode()) or own
        if type(exception) is RuntimeError and str(exception) not in first:  # all ranks may raise the same
            exception.add_note(first)
        return
    text = " ".join(str(exception).split())  # on one line, together with the cause
    if (cause := _ask_store(lambda store: _awaited(store, key))) is not None:
        message = f"{cause} (rank {rank} then lost the connection: {text})"
    else:
        reached = f"rank {rank} could not reach it: {text}"
        message = f"another rank ended without saying why; it may have been killed ({reached})"
    exception.args = (message,)


def _awaited(store: Store, key: str) -> str:
    store.wait([key], _CAUSE_TIMEOUT)
    return store.get(key).decode()
