"""The points of a run at which Lightning calls us before the user's callbacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback
from typing_extensions import override


@dataclass(frozen=True)
class Hooks:
    """What is called at these points; each is reached by all ranks.

    Attributes:
        before_batch: a training batch is about to be fetched.
        end_batch: a training batch is over.
        end_epoch: this rank has no more batches in this training epoch.
        end_training: the last epoch is over.
        merge_buffers: somebody is about to look at the module: a validation begins.
        begin_evaluation: a validation, test or prediction begins.
        end_evaluation: it is over.
    """

    before_batch: Callable[[], None]
    end_batch: Callable[[], None]
    end_epoch: Callable[[], None]
    end_training: Callable[[], None]
    merge_buffers: Callable[[], None]
    begin_evaluation: Callable[[], None]
    end_evaluation: Callable[[], None]


class HookCallback(Callback):
    """Calls the hooks for which Lightning has callbacks; it has to be the first of a Trainer's callbacks.

    Args:
        hooks: of the run.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_batch()

    @override
    def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_epoch()

    @override
    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_training()

    @override
    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._hooks.merge_buffers()
        self._hooks.begin_evaluation()

    @override
    def on_test_start(self, *_: Any, **__: Any) -> None:
        self._hooks.begin_evaluation()

    @override
    def on_predict_start(self, *_: Any, **__: Any) -> None:
        self._hooks.begin_evaluation()

    @override
    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_evaluation()

    @override
    def on_test_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_evaluation()

    @override
    def on_predict_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_evaluation()
