"""Measures how long each training step takes, and how long of it a rank waits, alike for every strategy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_hetero.demo.scene import Patch

SCHEDULER = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True)
class StepTime:
    """One training step of one rank.

    Args:
        seconds: from the end of the step before to its own end, data loading included.
        idle: of these, the seconds in which the rank only waited.
        patches: of its local batch.
        computing: seconds for which it ran on its core; None where unknown.
    """

    seconds: float
    idle: float
    patches: tuple[Patch, ...]
    computing: float | None = None


class Clock(Protocol):
    """Marks points in a step, and computes times from them afterwards."""

    def mark(self) -> Any:
        """The current point in time."""

    def step(self, began: Any, gradients: Any, exchanged: Any, ended: Any, patches: tuple[Patch, ...]) -> StepTime:
        """The step from `began` to `ended`; in between, this rank's `gradients` were ready, then those of all ranks."""


class SchedulerClock:
    """For CPU ranks on Linux, whose kernel counts how long a thread ran, and how long it was ready to run.

    The rest of the time it waited for other ranks. Waiting for a core that another process occupies is not idle.
    """

    def mark(self) -> tuple[float, float, float]:
        """Seconds: wall-clock time, running, and ready to run."""
        running, ready, _ = SCHEDULER.read_text().split()
        return perf_counter(), int(running) / 1e9, int(ready) / 1e9

    def step(self, began: Any, gradients: Any, exchanged: Any, ended: Any, patches: tuple[Patch, ...]) -> StepTime:  # noqa: ARG002 - of `Clock`
        """See `Clock`; the marks in between are not needed."""
        seconds, running, ready = (after - before for before, after in zip(began, ended, strict=True))
        return StepTime(seconds, max(0.0, seconds - running - ready), patches, running)


class WallClock:
    """For CPU ranks elsewhere: the time between the rank's own gradients and those of all ranks counts as idle."""

    def mark(self) -> float:
        """Wall-clock seconds."""
        return perf_counter()

    def step(self, began: Any, gradients: Any, exchanged: Any, ended: Any, patches: tuple[Patch, ...]) -> StepTime:
        """See `Clock`."""
        return StepTime(ended - began, exchanged - gradients, patches)


class CudaClock:
    """Like `WallClock`, but in the GPU's own time, since the host runs ahead of it."""

    def mark(self) -> torch.cuda.Event:
        """An event for the time at which the GPU gets to this point of its stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, began: Any, gradients: Any, exchanged: Any, ended: Any, patches: tuple[Patch, ...]) -> StepTime:
        """See `Clock`; waits for the GPU, so it is called after the run."""
        ended.synchronize()
        return StepTime(began.elapsed_time(ended) / 1e3, gradients.elapsed_time(exchanged) / 1e3, patches)


def clock_for(accelerator: str) -> Clock:
    """The best clock for ranks of this kind."""
    if accelerator == "cuda":
        return CudaClock()
    return SchedulerClock() if SCHEDULER.exists() else WallClock()


class Stopwatch(Callback):
    """Times the steps of one run.

    Args:
        clock: see `Clock`.
        loaded: returns the patches that this rank has read since the last call.
    """

    def __init__(self, clock: Clock, loaded: Callable[[], list[Patch]]) -> None:
        self._clock = clock
        self._loaded = loaded
        self._handles: list[Any] = []
        self._marks: list[tuple[Any, Any, Any, Any, tuple[Patch, ...]]] = []
        self._patches: tuple[Patch, ...] = ()
        self._began: Any = None
        self._gradients: Any = None
        self._exchanged: Any = None

    def resume(self) -> None:
        """The next step begins now: the time since the last one does not count."""
        self._began = self._clock.mark()

    def steps(self) -> list[StepTime]:
        """All steps so far."""
        return [self._clock.step(*marks) for marks in self._marks]

    def _gradient_ready(self, _: torch.Tensor) -> None:
        self._gradients = self._clock.mark()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last mark of a backward pass counts. Each costs microseconds, and there are a dozen.
        self._handles = [p.register_post_accumulate_grad_hook(self._gradient_ready) for p in pl_module.parameters()]
        self.resume()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._patches = tuple(self._loaded())

    @override
    def on_before_optimizer_step(self, *_: Any) -> None:
        self._exchanged = self._clock.mark()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        ended = self._clock.mark()
        self._marks.append((self._began, self._gradients, self._exchanged, ended, self._patches))
        self._began = ended

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
