"""A rank that fails publishes why, so that the errors of the other ranks name the cause.

An error that is only a consequence of another rank's exit is recognized by where it is raised, never by its text: a
path or a user's own message may contain any words. With gloo, errors of a lost connection are raised in these places:

- A blocking call (`all_gather`, `broadcast`, `barrier`, …) raises a plain RuntimeError within `torch.distributed`, also
  if the user makes the call, or the backward pass of a synchronized layer does. NCCL and the store have exception types
  of their own, all of them `DistError`s.
- DDP's copying of buffers calls C++ from `torch.nn.parallel.distributed`.
- Asynchronous calls raise where they are waited for: in `Waits.complete`, which raises types of its own.
- The gradients' all-reduce is waited for in C++ by autograd's engine, which raises all errors of a backward pass. So
  the averaging hook records the errors of its calls.
"""

import traceback

import torch.distributed as dist

from lightning_hetero.exchange.waits import GaveUpError, LostConnectionError, Waits


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


def explain(exception: BaseException, waits: Waits, averaging: CollectiveErrors) -> None:
    """Publish why this rank fails; or, if it fails because another rank has, say so in the exception's message.

    The exception's own text is never lost. A RuntimeError that is not recognized as a consequence of another rank's
    exit may still be one, since gloo raises this type everywhere: if another rank has failed before, a note says so.

    Args:
        exception: the exception that ends the run on this rank, with its traceback.
        waits: of this rank.
        averaging: errors of the gradients' collective calls.
    """
    if not is_secondary_failure(exception, averaging):
        own = f"{waits.place} failed first: {type(exception).__name__}: {exception}"
        first = waits.publish_failure(own)
        if type(exception) is RuntimeError and str(exception) not in first:  # all ranks may raise the same
            exception.add_note(first)
        return
    text = " ".join(str(exception).split())  # on one line, together with the cause
    if (cause := waits.failure()) is not None:
        then = "gave up waiting" if isinstance(exception, GaveUpError) else "then lost the connection:"
        message = f"{cause} (rank {waits.rank} {then} {text})"
    else:
        message = f"{waits.broken()} (rank {waits.rank} lost the connection: {text})"
    exception.args = (message,)
