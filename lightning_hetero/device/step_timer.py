"""How long a rank works on a step by itself: never the time that it waits for other ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch


class DeviceClock(Protocol):
    """Points in time on a device."""

    def mark(self) -> Any:
        """Now."""

    def known(self, mark: Any) -> bool:
        """Whether the device has come to that point."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two known points."""


class HostClock:
    """Points in time of a device that works while the host calls: the CPU."""

    def mark(self) -> float:
        """Now."""
        return perf_counter()

    def known(self, mark: float) -> bool:  # noqa: ARG002 - the host's time is known at once
        """Always."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Between two points."""
        return end - start


class CudaClock:
    """Points in a CUDA stream: the host runs ahead of it, so they are read when the device has passed them."""

    def mark(self) -> torch.cuda.Event:
        """The end of what has been queued so far on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def known(self, mark: torch.cuda.Event) -> bool:
        """Whether the device has passed it; does not wait."""
        return bool(mark.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two points that the device has passed."""
        return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class StepTiming:
    """A rank's own work in one step: the stretches between its waits.

    Args:
        marks: reads the points.
        stretches: pairs of points, in order.
        averaging: pairs of points too: from the last local gradient to the averaged ones, for each backward pass.
    """

    marks: DeviceClock
    stretches: Sequence[tuple[Any, Any]]
    averaging: Sequence[tuple[Any, Any]] = ()

    def known(self) -> bool:
        """Whether the device has come to the end of the step."""
        return self.marks.known(self.stretches[-1][1])

    def seconds(self) -> float:
        """Seconds of own work.

        Raises:
            RuntimeError: the clock went back.
        """
        return self._sum(self.stretches)

    def averaging_seconds(self) -> float:
        """Seconds between this rank's last gradient and the averaged ones: it waits for others, and communicates.

        Raises:
            RuntimeError: the clock went back.
        """
        return self._sum(self.averaging)

    def _sum(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        parts = [self.marks.seconds(start, end) for start, end in pairs]
        if min(parts, default=0.0) < 0:
            raise RuntimeError(f"the clock went back by {-min(parts)} s during a step")
        return sum(parts)


class ComputeTimer:
    """A stopwatch for a rank's own work; it is stopped wherever the rank waits for others.

    Args:
        marks: points in time on the rank's device.
    """

    def __init__(self, marks: DeviceClock) -> None:
        self._marks = marks
        self._since: Any = None
        self._stretches: list[tuple[Any, Any]] = []
        self._averaging: list[tuple[Any, Any]] = []
        self._ready: Any = None
        self._open = False

    def start(self) -> None:
        """Begin a step, with data loading; a step that was not finished is forgotten."""
        self._stretches, self._averaging, self._ready = [], [], None
        self._since, self._open = self._marks.mark(), True

    def pause(self) -> None:
        """The rank begins to wait for others."""
        if self._since is not None:
            self._stretches.append((self._since, self._marks.mark()))
            self._since = None

    def resume(self) -> None:
        """The rank works again; outside a step nothing happens."""
        if self._open and self._since is None:
            self._since = self._marks.mark()

    def gradients_ready(self) -> None:
        """The last local gradient of a backward pass is there: from now on the rank waits, or communicates."""
        self.pause()
        if self._open:
            self._ready = self._stretches[-1][1]

    def backward_over(self) -> None:
        """The backward pass has ended, with averaged gradients where they were to be averaged."""
        self.resume()
        if self._ready is not None:
            self._averaging.append((self._ready, self._since))
            self._ready = None

    def stop(self) -> StepTiming | None:
        """The step is over; None where none was begun."""
        if not self._open:
            return None
        self.pause()
        self._open = False
        return StepTiming(self._marks, self._stretches, self._averaging)

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


def device_clock(device: torch.device) -> DeviceClock:
    """Points in time on a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


def compute_timer(device: torch.device) -> ComputeTimer:
    """The clock of a device."""
    return ComputeTimer(device_clock(device))
