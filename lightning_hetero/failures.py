"""A rank that fails says why where the others can read it, so that their errors name the cause and not its echo."""

import contextlib

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_KEY = "lightning_hetero/failure"


def _store() -> Store | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # There is no public way to the store of the default group; without it only the explanation is lost.
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None


def is_echo(exception: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has gone: a broken or timed-out connection."""
    return isinstance(exception, RuntimeError) and any(
        sign in str(exception).lower()
        for sign in ("connection closed", "connection reset", "timed out", "broken pipe", "gloo", "nccl")
    )


def publish(rank: int, device: str, exception: BaseException) -> None:
    """Tell the other ranks why this one fails, unless another rank was first."""
    cause = f"rank {rank} ({device}) failed first: {type(exception).__name__}: {exception}"
    with contextlib.suppress(Exception):  # the store goes with rank 0: then there is nobody left to tell
        store = _store()
        if store is not None:
            store.compare_set(_KEY, "", cause)


def heard() -> str | None:
    """Why the first rank failed, if it could say so."""
    with contextlib.suppress(Exception):  # the store goes with rank 0
        store = _store()
        if store is not None and store.check([_KEY]):
            cause: bytes = store.get(_KEY)
            return cause.decode()
    return None
