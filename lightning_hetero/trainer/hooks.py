"""Hooks of a run, which Lightning calls before the user's callbacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback
from typing_extensions import override


@dataclass(frozen=True)
class TrainingHooks:
    """What is called during training, at points that all ranks reach.

    Attributes:
        before_batch: a training batch is about to be fetched.
        end_batch: a training batch ends.
        end_epoch: this rank has no more batches in this training epoch.
        pause: a validation begins, or training is over: buffers are merged, and what follows is no training step.
    """

    before_batch: Callable[[], None]
    end_batch: Callable[[], None]
    end_epoch: Callable[[], None]
    pause: Callable[[], None]


class HookCallback(Callback):
    """Calls the hooks for which Lightning has callbacks; it has to be the first of a Trainer's callbacks.

    Args:
        hooks: of the training.
        end_training: the last epoch ends, on all ranks.
        begin_evaluation: a validation, test or prediction begins, on all ranks.
        begin_evaluation_batch: a batch of a validation, test or prediction begins.
        end_prediction: a prediction has no more batches.
        end_evaluation: it ends, on all ranks.
    """

    def __init__(
        self,
        hooks: TrainingHooks,
        end_training: Callable[[], None],
        begin_evaluation: Callable[[], None],
        begin_evaluation_batch: Callable[[], None],
        end_prediction: Callable[[], None],
        end_evaluation: Callable[[], None],
    ) -> None:
        self._hooks = hooks
        self._end_training = end_training
        self._begin_evaluation = begin_evaluation
        self._begin_evaluation_batch = begin_evaluation_batch
        self._end_prediction = end_prediction
        self._end_evaluation = end_evaluation

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_batch()

    @override
    def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
        self._hooks.end_epoch()

    @override
    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end_training()
        self._hooks.pause()

    @override
    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._hooks.pause()
        self._begin_evaluation()

    @override
    def on_test_start(self, *_: Any, **__: Any) -> None:
        self._begin_evaluation()

    @override
    def on_predict_start(self, *_: Any, **__: Any) -> None:
        self._begin_evaluation()

    @override
    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        self._begin_evaluation_batch()

    @override
    def on_test_batch_start(self, *_: Any, **__: Any) -> None:
        self._begin_evaluation_batch()

    @override
    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        self._begin_evaluation_batch()

    @override
    def on_predict_epoch_end(self, *_: Any, **__: Any) -> None:
        self._end_prediction()

    @override
    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self._end_evaluation()

    @override
    def on_test_end(self, *_: Any, **__: Any) -> None:
        self._end_evaluation()

    @override
    def on_predict_end(self, *_: Any, **__: Any) -> None:
        self._end_evaluation()
