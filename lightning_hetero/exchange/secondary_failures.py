"""Tells an error that follows from another rank's end from one that has its cause on this rank.

Where it comes from decides, never its words: a path or a user's sentence may contain any of them. This is where the
errors of a lost connection surface, on gloo:

- A blocking call (`all_gather`, `broadcast`, `barrier`, …) raises a plain RuntimeError within `torch.distributed`, also
  where a user makes the call, and within the backward pass of a synchronised layer. NCCL and the store have types of
  their own, all of them `DistError`.
- DDP's copying of buffers calls C++ from `torch.nn.parallel.distributed`.
- Waiting for a call that was started earlier raises where the waiting is done: in `PendingRows.wait`, which gives the
  error a type of its own.
- The gradients' all-reduce is waited for in C++ by autograd's engine, as all errors of a backward pass are raised
  there. So the averaging hook notes the errors of its calls.
"""

from types import FrameType

import torch.distributed as dist

from lightning_hetero.exchange.groups import LostConnectionError


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
    """Whether an exception is what a rank sees when another one has ended: a broken or timed-out connection.

    Args:
        exception: with its traceback.
        averaging: errors of the gradients' collective calls.
    """
    if isinstance(exception, dist.DistError | LostConnectionError):
        return True
    if type(exception) is not RuntimeError:  # subclasses, such as running out of memory, say what they are
        return False
    frame = _innermost_frame(exception)
    return (frame is not None and _calls_other_ranks(frame)) or averaging.include(exception)


def _innermost_frame(exception: BaseException) -> FrameType | None:
    """The Python code that raised, or that called the C++ code that did."""
    traceback = exception.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame if traceback is not None else None


def _calls_other_ranks(frame: FrameType) -> bool:
    module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    if module == "torch.nn.parallel.distributed":  # the rest of it checks what the user does
        return function == "_distributed_broadcast_coalesced"
    return bool(module == "torch.distributed" or module.startswith("torch.distributed."))
