"""`trainer.should_stop`, set on any rank in any hook, stops all ranks after the same step."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.exchange.messages import ASKS_TO_STOP, all_ask


class EarlyStop:
    """Shares `trainer.should_stop`; until all ranks know of it, it is hidden from Lightning's loops.

    A rank's wish to stop is sent with its messages and with what ranks exchange at the ends of epochs and evaluations.
    At the end of a step nothing is exchanged. So there, a rank on which it was set just now asks whether it was set on
    all: if so, all stop after this step, as one process does. Otherwise the others have begun the next step, which the
    asking rank then makes as well, and all stop after that.

    Args:
        trainer: of the run.
        group: of all ranks.
        next_step: the number of the next global batch.
    """

    def __init__(self, trainer: "pl.Trainer", group: RankGroup, next_step: Callable[[], int]) -> None:
        self._trainer = trainer
        self._group = group
        self._next_step = next_step
        self._is_hidden = False
        self._is_shared = False

    @property
    def wanted(self) -> bool:
        """Whether this rank is to stop, for the others."""
        return self._is_hidden or self._trainer.should_stop

    def share(self, wanted: bool) -> None:
        """All ranks know whether any of them is to stop, the same on all ranks."""
        self._is_hidden, self._is_shared = False, wanted
        if wanted:
            self._trainer.should_stop = True

    def exchange(self) -> None:
        """Exchange whether any rank is to stop; all ranks call this together."""
        self.share(self._group.any_of([self.wanted], "an exchange of should_stop")[0])

    def ask(self) -> None:
        """If it was set on this rank just now, ask whether it was set on all; in between two messages of steps."""
        if self._hide():
            self._ask()

    def is_validation_due(self, is_due: Callable[..., bool], *args: Any) -> bool:
        """Whether a validation begins after a step: when it is due, and, as Lightning has it, before all stop early."""
        is_new = self._hide()
        due = is_due(*args)
        if due or not is_new:
            return due
        return is_due(*args) if self._ask() else due

    def _hide(self) -> bool:
        """Hide what only this rank may know; returns whether there is anything new to hide."""
        if self._group.world_size == 1 or not self._trainer.should_stop:
            self._is_shared = False
            return False
        if self._is_shared:
            return False
        self._trainer.should_stop, self._is_hidden = False, True
        return True

    def _ask(self) -> bool:
        on_all = all_ask(self._group, ASKS_TO_STOP, self._next_step())
        if on_all:
            self.share(True)
        return on_all
