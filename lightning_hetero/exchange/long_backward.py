"""Detects that a rank waits in a backward pass that another rank has skipped, so that neither waits forever."""

import contextlib
import threading
from time import monotonic

from torch.distributed.distributed_c10d import Store

_KEY = "lightning_hetero/long_backward/{}"

_LONG = 5.0
"""Seconds. Chosen: longer than most backward passes, so the store is rarely written to; short for a user who waits."""


class LongBackwardMonitor:
    """Publishes that this rank has been in a backward pass for long, and looks for other ranks that have.

    A backward pass ends only once all ranks have run theirs. So if a rank is at a later step while another is still in
    the backward pass, it has skipped that pass. The main thread is blocked during a backward pass, so a second thread
    publishes it after `seconds`, in the store that all ranks share. With a single rank there is no store.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, seconds: float = _LONG) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._seconds = seconds
        # Held also while writing to the store, so that nothing is published after `leave` has cleared it.
        self._lock = threading.Lock()
        self._inside: tuple[int, float] | None = None  # step, and since when
        self._is_published = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="long backward monitor", daemon=True)
        if store is not None:
            self._thread.start()

    def enter(self, step: int) -> None:
        """Called when a backward pass begins whose gradients are averaged over all ranks."""
        with self._lock:
            self._inside = (step, monotonic())

    def leave(self) -> None:
        """Called when it has ended; does nothing if there was none."""
        with self._lock:
            self._inside = None
            if self._is_published:
                self._set("")

    def stop(self) -> None:
        """Stop the thread at the end of the run."""
        self._stopped.set()
        if self._store is not None:
            self._thread.join()
        self.leave()  # an interrupted backward pass must not be seen by the next run

    def check_others(self, step: int) -> None:
        """Check that no other rank is still in the backward pass of a step before `step`, at which this rank is.

        Raises:
            RuntimeError: one is, so this rank has skipped a backward pass that the other rank runs.
        """
        for other, inside in self.others().items():
            if inside < step:
                raise RuntimeError(
                    f"rank {self._rank} is at global batch {step} while rank {other} waits in the backward pass of "
                    f"global batch {inside}: rank {self._rank} has skipped a backward pass that rank {other} made. "
                    "Make all ranks run the same backward passes."
                )

    def others(self) -> dict[int, int]:
        """The other ranks that have been in a backward pass for long, with the step that it belongs to."""
        found: dict[int, int] = {}
        if self._store is None:
            return found
        for other in range(self._world_size):
            key = _KEY.format(other)
            if other != self._rank and self._store.check([key]) and (text := self._store.get(key).decode()):
                found[other] = int(text)
        return found

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds / 2):
            with self._lock:
                if self._inside is None or self._is_published:
                    continue
                step, since = self._inside
                if monotonic() - since > self._seconds:
                    self._set(str(step))

    def _set(self, text: str) -> None:
        self._is_published = bool(text)
        with contextlib.suppress(Exception):  # without the store nothing can be published
            if self._store is not None:
                self._store.set(_KEY.format(self._rank), text)
