"""How long a rank works on a step by itself: never the time that it waits for other ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter


class WorkClock:
    """A stopwatch for a rank's own work; it is stopped wherever the rank waits for others.

    Args:
        now: seconds on a clock that only goes forward.
    """

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        self._now = now
        self._since: float | None = None
        self._seconds = 0.0
        self._open = False

    def start(self) -> None:
        """Begin a step, with data loading; a step that was not finished is forgotten."""
        self._seconds, self._since, self._open = 0.0, self._now(), True

    def pause(self) -> None:
        """The rank begins to wait for others."""
        if self._since is not None:
            elapsed = self._now() - self._since
            if elapsed < 0:
                raise RuntimeError(f"the clock went back by {-elapsed} s during a step")
            self._seconds += elapsed
            self._since = None

    def resume(self) -> None:
        """The rank works again; outside a step nothing happens."""
        if self._open and self._since is None:
            self._since = self._now()

    def stop(self) -> float | None:
        """Seconds of own work since `start`; None where no step was begun."""
        if not self._open:
            return None
        self.pause()
        self._open = False
        return self._seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave out what happens inside; nests."""
        was_running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if was_running:
                self.resume()
