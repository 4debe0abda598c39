"""Which epoch a Trainer is at."""

import lightning.pytorch as pl
from lightning.pytorch.loops.progress import _ProcessedTracker


def epoch_of(trainer: "pl.Trainer") -> int:
    """The epoch that is trained, or that comes next.

    `Trainer.current_epoch` still is the epoch before while a resumed run sets its loaders up.
    """
    progress = trainer.fit_loop.epoch_progress.current
    assert isinstance(progress, _ProcessedTracker), "Lightning counts processed epochs, and saves them"
    return progress.processed
