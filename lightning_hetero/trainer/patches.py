"""All that is replaced on a Trainer for a run, beyond Lightning's public interface, and how it is put back.

Each is an attribute that Lightning reads on one object; a test fails when Lightning no longer has one of them.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer


class TrainerPatches:
    """Connects a strategy to its Trainer for one run.

    Args:
        trainer: whose.
        metrics: of the run; closed when the Trainer is restored.
        prepare_dataloader: in place of Lightning's, which injects samplers.
        before_batch: called before a batch is fetched, in place of a broadcast; see `signals.StopRequest`.
        on_sigterm: the handler of SIGTERM.
        callbacks: called before the user's.

    Raises:
        RuntimeError: Lightning has no such attribute; the Trainer is then as it was.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        metrics: MetricSynchronizer,
        *,
        prepare_dataloader: Callable[..., object],
        before_batch: Callable[[], None],
        on_sigterm: Callable[[int, Any], None],
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._trainer, self._metrics, self._callbacks = trainer, metrics, list(callbacks)
        self._before: list[tuple[dict[str, Any], str, dict[str, Any]]] = []  # attributes, a name, what it was
        validating, evaluating, testing = metrics.evaluation_results
        try:
            for path, value in {
                "_data_connector._prepare_dataloader": prepare_dataloader,
                "_signal_connector._sigterm_notifier_fn": on_sigterm,
                "_logger_connector": metrics.connector,
                "fit_loop.epoch_loop._broadcast_sigterm_tensor": before_batch,
                "fit_loop.epoch_loop._should_check_val_fx": metrics.is_validation_due,
                "fit_loop.epoch_loop._results": metrics.step_logging.results,
                "fit_loop.epoch_loop.val_loop._results": validating,
                "validate_loop._results": evaluating,
                "test_loop._results": testing,
            }.items():
                self._replace(path, value)
            self._before_monitors(metrics.epoch_over)
            self._trainers_callbacks[:0] = self._callbacks
        except BaseException:
            self.restore()
            raise

    def _replace(self, path: str, value: object) -> None:
        parent, _, name = path.rpartition(".")
        try:
            owner = attrgetter(parent)(self._trainer) if parent else self._trainer
            getattr(owner, name)
        except AttributeError:
            raise RuntimeError(f"this Lightning has no Trainer.{path}: use lightning 2.6") from None
        self._set(owner, name, value)

    def _set(self, owner: object, name: str, value: object) -> None:
        attributes = vars(owner)
        self._before.append((attributes, name, {name: attributes[name]} if name in attributes else {}))
        attributes[name] = value

    def _before_monitors(self, call: Callable[[], None]) -> None:
        """Call it between the module's hook at the end of a training epoch and callbacks that monitor what it logs.

        Lightning takes only these two kinds there, and the Trainer gives the first of each to users as the one that
        they have set, so a callback of our own can't come before them.
        """
        first = next((one for one in self._trainers_callbacks if isinstance(one, EarlyStopping | Checkpoint)), None)
        if first is not None:
            hook = first.on_train_epoch_end

            def on_train_epoch_end(*args: Any, **kwargs: Any) -> None:
                call()
                hook(*args, **kwargs)

            self._set(first, "on_train_epoch_end", on_train_epoch_end)

    @property
    def _trainers_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = vars(self._trainer)["callbacks"]  # set where mypy can't see it
        return callbacks

    def restore(self) -> None:
        """Leave the Trainer as it was; idempotent."""
        while self._before:
            attributes, name, value = self._before.pop()
            attributes.pop(name, None)
            attributes.update(value)
        callbacks = self._trainers_callbacks
        callbacks[:] = [one for one in callbacks if not any(one is own for own in self._callbacks)]
        self._metrics.close()
