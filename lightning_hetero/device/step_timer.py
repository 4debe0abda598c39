"""How long a rank computes in a step, without the time that it waits for other ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch


class HostClock:
    """Points in time of a device that is synchronous with the host: the CPU."""

    def now(self) -> float:
        """The point at which the device will have finished all work submitted so far."""
        return perf_counter()

    def has_passed(self, point: float) -> bool:  # noqa: ARG002 - the host has always passed its own points
        """Whether the device has reached that point; does not wait."""
        return True

    def seconds(self, start: float, end: float) -> float:
        """Seconds between two points that the device has passed."""
        return end - start


class CudaClock:
    """The same for a CUDA stream: the host runs ahead of it, so points are read once the device has passed them."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, point: torch.cuda.Event) -> bool:
        return bool(point.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1000


DeviceClock = HostClock | CudaClock


def device_clock(device: torch.device) -> DeviceClock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class StepTiming:
    """What a rank has measured in one step, as pairs of points in time."""

    clock: DeviceClock
    compute: Sequence[tuple[Any, Any]]  # the intervals in which the rank computed, in order
    sync: Sequence[tuple[Any, Any]] = ()  # from the last local gradient to the averaged ones, for each backward pass

    def has_passed(self) -> bool:
        """Whether the device has reached the end of the step; only then can the seconds be read."""
        return self.clock.has_passed(self.compute[-1][1])

    def compute_seconds(self) -> float:
        return self._sum(self.compute)

    def sync_seconds(self) -> float:
        """Seconds from this rank's last local gradient to the averaged ones: it waits for others, and communicates."""
        return self._sum(self.sync)

    def _sum(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        parts = [self.clock.seconds(start, end) for start, end in pairs]
        if min(parts, default=0.0) < 0:
            raise RuntimeError(f"the clock went back by {-min(parts)} s during a step")
        return sum(parts)


class ComputeTimer:
    """Measures a rank's compute time; paused whenever the rank waits for others."""

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock
        self._in_step = False
        self._since: Any = None  # None while the rank waits, and outside a step
        self._compute: list[tuple[Any, Any]] = []
        self._sync: list[tuple[Any, Any]] = []
        self._ready: Any = None

    def start(self) -> None:
        """Begin a step, at its data loading; an unfinished step is dropped."""
        self._compute, self._sync, self._ready = [], [], None
        self._since, self._in_step = self._clock.now(), True

    def stop(self) -> StepTiming | None:
        """End the step; returns None if none was begun."""
        if not self._in_step:
            return None
        self._pause()
        self._in_step = False
        return StepTiming(self._clock, self._compute, self._sync)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Exclude the time spent inside; can be nested."""
        was_running = self._since is not None
        self._pause()
        try:
            yield
        finally:
            if was_running:
                self._resume()

    def gradients_ready(self) -> None:
        """Called when the last local gradient of a backward pass is ready: now the rank waits, or communicates."""
        self._pause()
        if self._in_step:
            self._ready = self._compute[-1][1]

    def backward_over(self) -> None:
        """Called when the backward pass has ended, including the averaging of its gradients if there is any."""
        self._resume()
        if self._ready is not None:
            self._sync.append((self._ready, self._since))
            self._ready = None

    def _pause(self) -> None:
        if self._since is not None:
            self._compute.append((self._since, self._clock.now()))
            self._since = None

    def _resume(self) -> None:
        if self._in_step and self._since is None:
            self._since = self._clock.now()
