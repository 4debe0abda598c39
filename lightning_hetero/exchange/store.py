"""The key-value store of the rendezvous, by which ranks tell each other what their process groups no longer can."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_RUNS = "lightning_hetero/runs"


def default_store() -> Store | None:
    """The store, which still works after a failure; None if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # There is no public access to it; without it, only the explanation of a failure is lost.
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None


def ask(store: Store | None, call: Callable[[Store], T]) -> T | None:
    """The result of `call` on the store; None if that fails, for instance after rank 0, which hosts it, has exited."""
    with contextlib.suppress(Exception):
        if store is not None:
            return call(store)
    return None


def value(store: Store, key: str) -> str | None:
    """The value under a key; None if there is none."""
    return store.get(key).decode() if store.check([key]) else None


def lives_in_a_rank(store: Store | None) -> bool:
    """Whether the store ends with the process of a rank, rank 0's; a file doesn't."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return isinstance(store, TCPStore)


def new_run() -> int:
    """A number that no earlier run of this job has had, so that a later run never sees an earlier one's failure.

    It differs between ranks; all of them must use rank 0's.
    """
    return ask(default_store(), lambda store: store.add(_RUNS, 1)) or 0  # without the store nothing can be published
