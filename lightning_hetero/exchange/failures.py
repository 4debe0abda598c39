"""A rank that fails publishes why, so that the errors of the other ranks name the cause.

An error that only follows from another rank's end is known by where it comes from, never by its words: a path or a
user's sentence may contain any of them. The errors of a lost connection surface, on gloo, in these places:

- A blocking call (`all_gather`, `broadcast`, `barrier`, …) raises a plain RuntimeError within `torch.distributed`, also
  where a user makes the call, and within the backward pass of a synchronized layer. NCCL and the store have types of
  their own, all of them `DistError`.
- DDP's copying of buffers calls C++ from `torch.nn.parallel.distributed`.
- Waiting for a call that was started earlier raises where the waiting is done: in `PendingRows.wait`, which gives the
  error a type of its own.
- The gradients' all-reduce is waited for in C++ by autograd's engine, as all errors of a backward pass are raised
  there. So the averaging hook notes the errors of its calls.
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

_LATEST = timedelta(seconds=2)
"""How long a cause is waited for. A rank publishes it before its connections close, so it is rarely waited for at all;
on a busy machine the order may be the other one."""


def default_store() -> Store | None:
    """The key-value store through which ranks met, which answers also after a failure; None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # There is no public way to it; without it, only the explanation of a failure is lost.
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None


def _ask_store(call: Callable[[Store], T]) -> T | None:
    """What `call` makes of the store; None if that fails, as where the store has ended with rank 0."""
    with contextlib.suppress(Exception):
        if (store := default_store()) is not None:
            return call(store)
    return None


def new_run() -> int:
    """A number that no run of this job has had, so that a later run never sees an earlier one's failure.

    It differs from rank to rank; rank 0's is the one to agree on.
    """
    return _ask_store(lambda store: store.add(_RUNS, 1)) or 0  # without the store nothing can be published either


class CollectiveErrors:
    """Errors of collective calls that surface elsewhere, in a traceback that doesn't show the call."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, error: BaseException) -> None:
        """A collective call has failed; called from any thread, before the error surfaces."""
        self._texts.append(str(error))

    def include(self, exception: BaseException) -> bool:
        """Whether an exception is one of them; C++ adds its own words around the text on the way."""
        return any(text in str(exception) for text in self._texts)


def is_secondary_failure(exception: BaseException, averaging: CollectiveErrors) -> bool:
    """Whether an exception is what a rank sees when another one has ended: a broken or timed-out connection."""
    if isinstance(exception, dist.DistError | LostConnectionError):
        return True
    if type(exception) is not RuntimeError:  # subclasses, such as running out of memory, say what they are
        return False
    return _is_from_collective_call(exception) or averaging.include(exception)


def _is_from_collective_call(exception: BaseException) -> bool:
    """Whether the Python code that raised, or that called the C++ code that did, calls other ranks."""
    frames = [frame for frame, _ in traceback.walk_tb(exception.__traceback__)]
    if not frames:
        return False
    module = f"{frames[-1].f_globals.get('__name__', '')}."
    if module == "torch.nn.parallel.distributed.":  # the rest of it checks what the user does
        return frames[-1].f_code.co_name == "_distributed_broadcast_coalesced"
    return module.startswith("torch.distributed.")


def explain(exception: BaseException, *, run: int, rank: int, device: str, averaging: CollectiveErrors) -> None:
    """Publish why this rank fails; or, if it fails because another one has, say so in the exception's message.

    What the exception says itself is never lost. A RuntimeError that is not known to follow from another rank's end may
    still do so, as gloo raises this type everywhere: where another rank has failed before, a note names its failure.

    Args:
        exception: that ends the run on this rank, with its traceback.
        run: on which all ranks have agreed; see `new_run`.
        rank: this rank.
        device: its name.
        averaging: errors of the gradients' collective calls.
    """
    key = _FAILURE.format(run)
    if not is_secondary_failure(exception, averaging):
        own = f"rank {rank} ({device}) failed first: {type(exception).__name__}: {exception}"
        first = _ask_store(lambda store: store.compare_set(key, "", own).decode()) or own
        if type(exception) is RuntimeError and str(exception) not in first:  # all ranks may raise the same
            exception.add_note(first)
        return
    text = " ".join(str(exception).split())  # in one line, which shows the cause too
    if (cause := _ask_store(lambda store: _awaited(store, key))) is not None:
        message = f"{cause} (rank {rank} then lost the connection: {text})"
    else:
        reached = f"rank {rank} could not reach it: {text}"
        message = f"another rank ended without saying why; it may have been killed ({reached})"
    exception.args = (message,)


def _awaited(store: Store, key: str) -> str:
    store.wait([key], _LATEST)
    return store.get(key).decode()
