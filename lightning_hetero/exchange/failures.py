"""A rank that fails says why where the others can read it, so that their errors name the cause and not its echo."""

import contextlib
import threading
from time import monotonic

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_RUNS = "lightning_hetero/runs"
_FAILURE = "lightning_hetero/failure/{}"
_LONG_BACKWARD = "lightning_hetero/long_backward/{}"


def _store() -> Store | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    # There is no public way to the store of the default group; without it only the explanation is lost.
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None


def is_secondary_failure(exception: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has gone: a broken or timed-out connection."""
    return isinstance(exception, RuntimeError) and any(
        sign in str(exception).lower()
        for sign in ("connection closed", "connection reset", "timed out", "broken pipe", "gloo", "nccl")
    )


def new_run() -> int:
    """A number that no run of this job has had, so that a later run never hears of an earlier one's failure.

    It differs from rank to rank; rank 0's is the one to agree on.
    """
    with contextlib.suppress(Exception):  # without the store nothing can be told either
        store = _store()
        if store is not None:
            return store.add(_RUNS, 1)
    return 0


def publish(run: int, rank: int, device: str, exception: BaseException) -> None:
    """Tell the other ranks why this one fails, unless another rank was first.

    Args:
        run: on which all ranks have agreed; see `new_run`.
        rank: this rank.
        device: that it drives.
        exception: why.
    """
    cause = f"rank {rank} ({device}) failed first: {type(exception).__name__}: {exception}"
    with contextlib.suppress(Exception):  # the store goes with rank 0: then there is nobody left to tell
        store = _store()
        if store is not None:
            store.compare_set(_FAILURE.format(run), "", cause)


def first_failure(run: int) -> str:
    """Why the first rank of this run failed, or that it could not say so."""
    with contextlib.suppress(Exception):  # the store goes with rank 0
        store = _store()
        if store is not None and store.check([_FAILURE.format(run)]):
            cause: bytes = store.get(_FAILURE.format(run))
            return cause.decode()
    return "another rank ended without saying why; it may have been killed"


class BackwardWatch:
    """Lets the other ranks know when this one sits in a backward pass for long.

    A backward pass ends when all ranks have made theirs. So a rank that has gone on to a later step while another is
    still in one has skipped it, and both would wait for ever: see `check_backward`. The main thread can't tell, it is
    inside the backward pass; a thread of this watch does.

    Args:
        rank: this rank.
        long: seconds after which a backward pass is told of.
    """

    def __init__(self, rank: int, long: float = 5.0) -> None:
        self._rank = rank
        self._long = long
        self._inside: tuple[int, float] | None = None  # step, and since when
        self._told = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="backward watch", daemon=True)
        self._thread.start()

    def enter(self, step: int) -> None:
        """A backward pass that is averaged over all ranks begins."""
        self._inside = (step, monotonic())

    def leave(self) -> None:
        """It has ended."""
        self._inside = None
        if self._told:
            self._tell("")

    def stop(self) -> None:
        """The run is over."""
        self._stopped.set()
        self._thread.join()
        self.leave()  # a pass that was broken off is none of the next run's

    def _watch(self) -> None:
        while not self._stopped.wait(self._long / 2):
            inside = self._inside
            if inside is not None and not self._told and monotonic() - inside[1] > self._long:
                self._tell(str(inside[0]))

    def _tell(self, text: str) -> None:
        self._told = bool(text)
        with contextlib.suppress(Exception):  # without the store nobody can be told
            store = _store()
            if store is not None:
                store.set(_LONG_BACKWARD.format(self._rank), text)


def check_backward(rank: int, world_size: int, step: int) -> None:
    """See that no rank is in the backward pass of a step that this one has left.

    Raises:
        RuntimeError: one is, so this rank has skipped a backward pass that the others made.
    """
    store = _store()
    if store is None:
        return
    for other in range(world_size):
        key = _LONG_BACKWARD.format(other)
        if other == rank or not store.check([key]):
            continue
        text = store.get(key).decode()
        if text and int(text) < step:
            raise RuntimeError(
                f"rank {rank} is at global batch {step} while rank {other} waits in the backward pass of global batch "
                f"{text}: rank {rank} has skipped a backward pass that rank {other} made. Let all ranks make the same."
            )
