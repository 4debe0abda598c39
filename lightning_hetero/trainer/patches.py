"""Whatever the strategy sets on a Trainer beyond Lightning's public interface goes through this room.

Each is an attribute that Lightning calls on the instance, set on one Trainer only and taken away afterwards. A test
fails when Lightning changes any of them.
"""
# ruff: noqa: SLF001 - that is what this room is for

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

Patch = tuple[Any, str, Any]
"""An object, the name of an attribute that Lightning calls on it, and what stands in for it during a run."""


def following(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    """One call that makes both, and returns what the second returns."""

    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


class StepCallback(Callback):
    """Hears of the end of batches and epochs, and of results being looked at, before the user's callbacks do.

    Args:
        on_batch_end: a training batch is over.
        on_epoch_end: this rank has no more batches in this epoch.
        on_look: a validation begins, or training is over: on all ranks.
    """

    def __init__(
        self, on_batch_end: Callable[[], None], on_epoch_end: Callable[[], None], on_look: Callable[[], None]
    ) -> None:
        self._on_batch_end = on_batch_end
        self._on_epoch_end = on_epoch_end
        self._on_look = on_look

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._on_batch_end()

    @override
    def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
        self._on_epoch_end()

    @override
    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._on_look()

    @override
    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._on_look()


class StopRequest:
    """A signal that asks this rank to stop, until all ranks know of it.

    Lightning's own handler, and its check before each batch, are blocking broadcasts: a rank that meets one alone hangs
    there. Here the handler sets a flag; it travels with the next step's message, and all ranks stop after that step.

    Args:
        trainer: whose; between ranks only training has messages, so other runs stop by themselves.
    """

    def __init__(self, trainer: "pl.Trainer") -> None:
        self._trainer = trainer
        self.made = False

    def handle(self, signum: int, _: object) -> None:
        """The handler of SIGTERM."""
        launcher = self._trainer.strategy.launcher
        if not self.made and launcher is not None:
            launcher.kill(signum)
        self.made = True
        if self._trainer.state.fn != TrainerFn.FITTING:
            self.grant()

    def grant(self) -> None:
        """All ranks know: Lightning stops at the end of the step."""
        self._trainer._signal_connector.received_sigterm = True


class TrainerPatches:
    """Connects a strategy to its Trainer for one run.

    Args:
        trainer: whose.
        prepare_dataloader: in place of Lightning's, which injects samplers.
        before_batch: called before a batch is fetched, in place of a broadcast; see `StopRequest`.
        stop: handles SIGTERM.
        callback: see `StepCallback`.
        more: further attributes to set.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        *,
        prepare_dataloader: Callable[..., object],
        before_batch: Callable[[], None],
        stop: StopRequest,
        callback: Callback,
        more: Sequence[Patch] = (),
    ) -> None:
        self._set: list[tuple[Any, str]] = []
        epoch_loop = trainer.fit_loop.epoch_loop
        for owner, name, value in (
            (trainer._data_connector, "_prepare_dataloader", prepare_dataloader),
            (epoch_loop, "_broadcast_sigterm_tensor", before_batch),
            (trainer._signal_connector, "_sigterm_notifier_fn", stop.handle),
            *more,
        ):
            if not hasattr(owner, name):
                raise RuntimeError(f"this Lightning has no {type(owner).__name__}.{name}: use lightning 2.6")
            setattr(owner, name, value)
            self._set.append((owner, name))
        self._callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009 - set where mypy can't see it
        self._callback = callback
        self._callbacks.insert(0, callback)

    def remove(self) -> None:
        """Leave the Trainer as it was."""
        for owner, name in self._set:
            vars(owner).pop(name, None)
        self._set.clear()
        if self._callback in self._callbacks:
            self._callbacks.remove(self._callback)
