"""Every place where the strategy reaches into a Trainer beyond Lightning's public interface, in one room.

Each is an attribute that Lightning calls on the instance, set on one Trainer only and taken away afterwards. A test
fails when Lightning changes any of them.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class StepCallback(Callback):
    """Hears of the end of batches and epochs, before the user's callbacks do.

    Args:
        on_batch_end: a training batch is over.
        on_epoch_end: this rank has no more batches in this epoch.
    """

    def __init__(self, on_batch_end: Callable[[], None], on_epoch_end: Callable[[], None]) -> None:
        self._on_batch_end = on_batch_end
        self._on_epoch_end = on_epoch_end

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._on_batch_end()

    @override
    def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
        self._on_epoch_end()


class Attachment:
    """Connects a strategy to its Trainer for one run.

    Args:
        trainer: whose.
        prepare_dataloader: in place of Lightning's, which injects samplers.
        before_batch: called before a batch is fetched, when the ranks have just been in step.
        update_metrics: in place of the training results' own.
        callback: see `StepCallback`.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        *,
        prepare_dataloader: Callable[..., object],
        before_batch: Callable[[], None],
        update_metrics: Callable[..., None],
        callback: Callback,
    ) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        # Its blocking broadcast of a stop flag comes before each batch; the wait in it is not this rank's work.
        in_step = epoch_loop._broadcast_sigterm_tensor

        def in_step_then_fetch() -> None:
            in_step()
            before_batch()

        self._set: list[tuple[Any, str]] = []
        for owner, name, value in (
            (trainer._data_connector, "_prepare_dataloader", prepare_dataloader),
            (epoch_loop, "_broadcast_sigterm_tensor", in_step_then_fetch),
            (epoch_loop._results, "update_metrics", update_metrics),
        ):
            setattr(owner, name, value)
            self._set.append((owner, name))
        self._callbacks: list[Callback] = trainer.callbacks
        self._callback = callback
        self._callbacks.insert(0, callback)

    def remove(self) -> None:
        """Leave the Trainer as it was."""
        for owner, name in self._set:
            vars(owner).pop(name, None)
        self._set.clear()
        if self._callback in self._callbacks:
            self._callbacks.remove(self._callback)
