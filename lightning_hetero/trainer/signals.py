"""SIGTERM to one rank stops all ranks after the same step."""
# ruff: noqa: SLF001 - Lightning has no public way to request a stop; `tests/test_private_names.py` guards it

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn


class StopRequest:
    """A signal that asks this rank to stop, until all ranks know of it.

    Lightning's own handler, and its check before each batch, are blocking broadcasts: a rank that reaches one alone
    hangs. Here the handler sets a flag, which is sent with the next message of a training step, or with what ranks
    exchange at the end of a validation; then all of them stop.

    Args:
        trainer: the one to stop. Ranks exchange messages only in `fit`; in other runs each rank stops by itself.
    """

    def __init__(self, trainer: "pl.Trainer") -> None:
        self._trainer = trainer
        self.requested = False

    def handle(self, signum: int, _: object) -> None:
        """The handler of SIGTERM."""
        launcher = self._trainer.strategy.launcher
        if not self.requested and launcher is not None:
            launcher.kill(signum)
        self.requested = True
        if self._trainer.state.fn != TrainerFn.FITTING:
            self.stop()

    def stop(self) -> None:
        """Make Lightning stop at its next check: at the end of a training step, or within an evaluation."""
        self._trainer._signal_connector.received_sigterm = True
