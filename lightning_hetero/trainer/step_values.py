"""What ranks have logged in each training step, sent with the messages of later steps, so that nobody waits for it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_hetero.device.step_timer import DeviceClock
from lightning_hetero.trainer.logged_values import (
    COLUMNS,
    LoggedKey,
    Numbers,
    is_zero,
    on_host,
    stacked_on_device,
    with_fetched,
)


@dataclass(frozen=True)
class StepValue:
    """What this rank has logged under a key in its last step."""

    value: Tensor
    weight: float | Tensor  # in the mean over ranks; 0 leaves the value out of any reduction; may be on the device
    step: int  # in which it was logged, from 1; the same numbers on all ranks

    def row(self, reduction: str) -> list[Tensor | float]:
        """A row of: the step in which it was logged; bytes of its type; the value (of a mean: × weight); the weight."""
        value: Tensor | float = self.value
        if reduction == "mean":
            value = self.value.double() * self.weight if not is_zero(self.weight) else 0.0
        return [float(self.step), float(self.value.element_size()), value, self.weight]


@dataclass(frozen=True)
class _Reading:
    """The numbers of one step, on their way to the host."""

    step: int
    numbers: Callable[[], Sequence[float]]
    has_arrived: Callable[[], bool]


class StepValues:
    """The values that ranks log in steps, for `callback_metrics` to have in every step.

    A rank sends the values of a step with its next message after its device has passed that step: on a CPU with that of
    the following step. They are complete when all ranks have sent theirs; all ranks find that out from the same
    messages, and so at the same time.

    Args:
        clock: of this rank's device.
        world_size: the number of ranks.
    """

    def __init__(self, clock: DeviceClock, world_size: int) -> None:
        self._clock, self._world_size = clock, world_size
        self._own: dict[str, StepValue] = {}
        self._readings: deque[_Reading] = deque()
        self._reported: dict[int, dict[int, Numbers]] = {}  # by step and rank

    def add(self, key: str, value: Tensor, weight: float | Tensor, step: int) -> None:
        """This rank has logged a value in a step."""
        self._own[key] = StepValue(value, weight, step)

    def row(self, key: LoggedKey) -> list[Tensor | float]:
        """This rank's last value of a key, see `StepValue.row`; zeros if there is none."""
        own = self._own.get(key.key)
        return own.row(key.reduction) if own is not None else [0.0] * COLUMNS

    def end_step(self, step: int, rows: Sequence[Sequence[Tensor | float]]) -> None:
        """A step is over: its row of each key goes to the other ranks with a later message."""
        self._readings.append(self._read(step, [number for row in rows for number in row]))

    def _read(self, step: int, numbers: Sequence[Tensor | float]) -> _Reading:
        stacked = stacked_on_device(numbers)
        if stacked is None:
            values = on_host(numbers)
            return _Reading(step, lambda: values, lambda: True)
        copied = stacked.to("cpu", non_blocking=True)
        point: Any = self._clock.now()
        return _Reading(step, lambda: with_fetched(numbers, copied.tolist()), lambda: self._clock.has_passed(point))

    def message(self, keys: int) -> list[float]:
        """The numbers to send with a message: a step, 0 for none, and a row for each of so many keys."""
        numbers: list[float] = []
        if self._readings and self._readings[0].has_arrived():
            reading = self._readings.popleft()
            numbers = [float(reading.step), *reading.numbers()]
        width = 1 + keys * COLUMNS  # keys may have been added since
        return numbers + [0.0] * (width - len(numbers))

    def receive(self, table: Numbers) -> tuple[int, Numbers] | None:
        """The step that is complete with these messages, (W, 1 + keys * columns), and its rows: (keys, W, columns)."""
        complete = None
        for rank, row in enumerate(table):
            if (step := int(row[0])) == 0:
                continue
            of_step = self._reported.setdefault(step, {})
            of_step[rank] = row[1:]
            if len(of_step) == self._world_size:
                complete = step
        if complete is None:
            return None
        found = self._reported[complete]
        self._reported = {step: rows for step, rows in self._reported.items() if step > complete}
        keys = table.shape[1] // COLUMNS
        rows = np.zeros((self._world_size, keys * COLUMNS))
        for rank, row in found.items():
            rows[rank, : len(row)] = row
        return complete, rows.reshape(self._world_size, keys, COLUMNS).swapaxes(0, 1)
