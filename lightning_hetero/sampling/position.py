"""The current position of training, and which pass over a loader comes next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Batch_co = TypeVar("Batch_co", covariant=True)


@dataclass(frozen=True)
class Position:
    """How far training has come."""

    epoch: int  # the current one, or between epochs the next one; from 0
    step: int  # global batches started since the run began, which is also the number of the next one


class Passes(Protocol[Batch_co]):
    """Passes over global batches, or over this rank's parts of them, that are begun one by one; see `GlobalBatches`."""

    @property
    def endless(self) -> bool: ...

    def draw(self, epoch: int, number: int) -> None: ...

    def batches(self, may_restart: Callable[[], bool], /) -> Iterator[Batch_co]: ...

    def __len__(self) -> int: ...


class EpochPasses(Generic[Batch_co]):
    """The passes over a loader's global batches, and the step at which each begins, given the position of training.

    A loader is read once an epoch, or several times if it is cycled beside a longer one.
    """

    def __init__(self, global_batches: Passes[Batch_co], position: Callable[[], Position]) -> None:
        self.global_batches = global_batches
        self._position = position
        self.epoch: int | None = None
        """Epoch of the last drawn pass; None before the first."""
        self._number = 0  # of the last drawn pass in its epoch
        self._first_step = 0
        self._end: int | None = None  # the step after the pass, once it has been read to its end

    def begin(self) -> int:
        """Draw the next pass, unless it has already been drawn and none of its steps was started.

        Returns the step of its first global batch.
        """
        position = self._position()
        if self.epoch != position.epoch:
            self.epoch, self._number, self._first_step = position.epoch, 0, position.step
        elif position.step > self._first_step:
            # A loader that is cycled within the epoch continues at the step where its last pass ended.
            self._number += 1
            self._first_step = position.step if self._end is None else self._end
        self._end = None
        self.global_batches.draw(self.epoch, self._number)
        return self._first_step

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch_co]]:
        """The global batches of the current pass, each with its step."""
        step = first_step
        for batch in self.global_batches.batches(lambda: self._position().step == first_step):
            yield step, batch
            step += 1
        self._end = step

    def __len__(self) -> int:
        """Number of global batches in the last drawn pass."""
        if self.epoch is None and not self.global_batches.endless:
            self.begin()
        return len(self.global_batches)
