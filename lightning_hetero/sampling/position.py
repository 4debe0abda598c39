"""Where training stands, and which pass over a loader comes next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning_hetero.sampling.global_batches import GlobalBatches, Index


@dataclass(frozen=True)
class Position:
    """Where training stands."""

    epoch: int  # the current one, or the one that comes next; from 0
    step: int  # global batches that have been started since the run began, which is the number of the next one


class EpochPasses:
    """The passes over a loader's global batches, and the step at which each begins, from where training stands now.

    A loader is read once an epoch, or several times if it is cycled beside a longer one.
    """

    def __init__(self, global_batches: GlobalBatches, position: Callable[[], Position]) -> None:
        self.global_batches = global_batches
        self._position = position
        self.epoch: int | None = None
        """Of the pass that was drawn last; None before the first."""
        self._number = 0  # of the pass in its epoch
        self._first_step = 0
        self._end: int | None = None  # the step after the pass, once it was read to its end

    def begin(self) -> int:
        """Draw the pass that comes next, unless it was drawn already and no step of it was started.

        Returns the step of its first global batch.
        """
        position = self._position()
        if self.epoch != position.epoch:
            self.epoch, self._number, self._first_step = position.epoch, 0, position.step
        elif position.step > self._first_step:
            # A loader that is cycled within the epoch goes on where its last pass ended.
            self._number += 1
            self._first_step = position.step if self._end is None else self._end
        self._end = None
        self.global_batches.draw(self.epoch, self._number)
        return self._first_step

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Index]]]:
        """The global batches of the pass that was begun, each with its step."""
        step = first_step
        for indices in self.global_batches.batches(lambda: self._position().step == first_step):
            yield step, indices
            step += 1
        self._end = step

    def __len__(self) -> int:
        """Global batches of the newest pass."""
        if self.epoch is None and not self.global_batches.endless:
            self.begin()
        return len(self.global_batches)
