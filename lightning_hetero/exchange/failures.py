"""A rank that fails publishes why, so that the errors of the other ranks name the cause."""

import contextlib
from datetime import timedelta

from lightning_hetero.exchange.secondary_failures import CollectiveErrors, is_secondary_failure
from lightning_hetero.exchange.store import default_store

_RUNS = "lightning_hetero/runs"
_FAILURE = "lightning_hetero/failure/{}"

_LATEST = timedelta(seconds=2)
"""How long a cause is waited for. A rank publishes it before its connections close, so it is rarely waited for at all;
a busy machine may bring the two into the other order."""


def new_run() -> int:
    """A number that no run of this job has had, so that a later run never sees an earlier one's failure.

    It differs from rank to rank; rank 0's is the one to agree on.
    """
    with contextlib.suppress(Exception):  # without the store nothing can be published either
        store = default_store()
        if store is not None:
            return store.add(_RUNS, 1)
    return 0


def explain(exception: BaseException, *, run: int, rank: int, device: str, averaging: CollectiveErrors) -> None:
    """Publish why this rank fails; or, if it fails because another one has, say so in the exception's message.

    What the exception says itself is never lost. A RuntimeError that is not known to follow from another rank's end may
    still do so, as gloo raises this type everywhere: where another rank has failed before, a note names its failure.

    Args:
        exception: that ends the run on this rank, with its traceback.
        run: on which all ranks have agreed; see `new_run`.
        rank: this rank.
        device: that it drives.
        averaging: errors of the gradients' collective calls.
    """
    if not is_secondary_failure(exception, averaging):
        own = f"rank {rank} ({device}) failed first: {type(exception).__name__}: {exception}"
        first = _publish(run, own)
        if type(exception) is RuntimeError and str(exception) not in first:  # all ranks may raise the same
            exception.add_note(first)
        return
    text = " ".join(str(exception).split())  # in one line, which shows the cause too
    cause = _published(run)
    if cause is not None:
        exception.args = (f"{cause} (rank {rank} then lost the connection: {text})",)
    else:
        exception.args = (
            f"another rank ended without saying why; it may have been killed (rank {rank} could not reach it: {text})",
        )


def _publish(run: int, cause: str) -> str:
    """Publish a cause unless another rank was first; returns the first one."""
    with contextlib.suppress(Exception):  # the store ends with rank 0: no rank that could read it is left
        store = default_store()
        if store is not None:
            first: bytes = store.compare_set(_FAILURE.format(run), "", cause)
            return first.decode()
    return cause


def _published(run: int) -> str | None:
    """Why the first rank of this run failed; None if no rank says so in time."""
    with contextlib.suppress(Exception):  # it was not published, or the store has ended with rank 0
        store = default_store()
        if store is not None:
            store.wait([_FAILURE.format(run)], _LATEST)
            cause: bytes = store.get(_FAILURE.format(run))
            return cause.decode()
    return None
