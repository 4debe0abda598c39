"""All that is replaced during a run on a Trainer, and in torchmetrics; and how it is restored afterwards.

Lightning has no public interface for them; a test fails when a release no longer has one of them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, partialmethod
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, Checkpoint, EarlyStopping
from torchmetrics import Metric

from lightning_hetero.trainer.early_stop import EarlyStop
from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer
from lightning_hetero.trainer.skipped_steps import StepResult
from lightning_hetero.trainer.torchmetrics import MetricSync


def patch_trainer(
    trainer: "pl.Trainer",
    metrics: MetricSynchronizer,
    early_stop: EarlyStop,
    *,
    prepare_dataloader: Callable[..., object],
    before_batch: Callable[[], None],
    on_sigterm: Callable[[int, Any], None],
    borrows: Callable[[], bool],
    callbacks: Sequence[Callback] = (),
) -> ExitStack:
    """Connect a strategy to its Trainer for one run.

    Args:
        trainer: the strategy's Trainer.
        metrics: of the run; closed with the returned stack.
        early_stop: of the run.
        prepare_dataloader: in place of Lightning's, which injects samplers.
        before_batch: called before a batch is fetched, in place of a broadcast; see `signals.StopRequest`.
        on_sigterm: the handler of SIGTERM.
        borrows: whether the samples of this rank's evaluation batch are borrowed: no prediction is written then.
        callbacks: called before the user's.

    Returns:
        A stack; closing it leaves the Trainer as it was, and closing it again does nothing.

    Raises:
        RuntimeError: Lightning has no such attribute; the Trainer is then as it was.
    """
    validating, evaluating, testing = metrics.evaluation_results
    with ExitStack() as stack:
        stack.callback(metrics.close)
        for path, value in {
            "_data_connector._prepare_dataloader": prepare_dataloader,
            "_signal_connector._sigterm_notifier_fn": on_sigterm,
            "_logger_connector": metrics.connector,
            "fit_loop.epoch_loop._broadcast_sigterm_tensor": before_batch,
            "fit_loop.epoch_loop._should_check_val_fx": partial(
                early_stop.is_validation_due, metrics.is_validation_due
            ),
            "fit_loop.epoch_loop.automatic_optimization.output_result_cls": StepResult,
            "fit_loop.epoch_loop._results": metrics.training_results,
            "fit_loop.epoch_loop.val_loop._results": validating,
            "validate_loop._results": evaluating,
            "test_loop._results": testing,
        }.items():
            _replace(stack, *_attribute(trainer, path), value)
        if metrics.metric_sync is not None:
            stack.callback(metrics.metric_sync.close)
            stack.callback(setattr, Metric, "sync", Metric.sync)
            Metric.sync = partialmethod(_sync, metrics.metric_sync)  # type: ignore[assignment, method-assign] # of all metrics, wherever they are held
        # Where Lightning's loops look at `should_stop` next: training begins, an epoch begins, a step or an epoch ends.
        _call_before(stack, *_attribute(trainer, "fit_loop.run"), early_stop.exchange)
        _call_after(stack, *_attribute(trainer, "fit_loop.epoch_loop.on_run_start"), early_stop.exchange)
        _call_before(
            stack, *_attribute(trainer, "fit_loop.epoch_loop._save_loggers_on_train_batch_end"), early_stop.ask
        )
        _call_after(stack, *_attribute(trainer, "fit_loop.on_advance_end"), early_stop.exchange)
        trainers_callbacks = vars(trainer)["callbacks"]  # set where mypy can't see it
        for callback in trainers_callbacks:
            if isinstance(callback, BasePredictionWriter):
                _skip_borrowed_batches(stack, callback, borrows)
        _call_before_monitors(stack, trainers_callbacks, metrics.exchange_epoch)
        stack.callback(_remove_callbacks, trainer, callbacks)
        trainers_callbacks[:0] = callbacks
        return stack.pop_all()


def _attribute(trainer: "pl.Trainer", path: str) -> tuple[object, str]:
    """The owner and the name of what is under a path of a Trainer."""
    parent, _, name = path.rpartition(".")
    try:
        owner = attrgetter(parent)(trainer) if parent else trainer
        getattr(owner, name)
    except AttributeError:
        raise RuntimeError(f"this Lightning has no Trainer.{path}: use lightning 2.6") from None
    return owner, name


def _replace(stack: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an attribute of an object until the stack is closed."""
    attributes = vars(owner)
    if name in attributes:
        stack.callback(attributes.__setitem__, name, attributes[name])
    else:
        stack.callback(attributes.pop, name, None)
    attributes[name] = value


def _call_before(stack: ExitStack, owner: object, name: str, call: Callable[[], None]) -> None:
    """Call `call` before a method, until the stack is closed."""
    method = getattr(owner, name)

    def call_first(*args: Any) -> None:
        call()
        method(*args)

    _replace(stack, owner, name, call_first)


def _call_after(stack: ExitStack, owner: object, name: str, call: Callable[[], None]) -> None:
    """Call `call` after a method, until the stack is closed."""
    method = getattr(owner, name)

    def then_call(*args: Any) -> None:
        method(*args)
        call()

    _replace(stack, owner, name, then_call)


def _call_before_monitors(stack: ExitStack, callbacks: list[Callback], call: Callable[[], None]) -> None:
    """Call `call` after the module's hook at the end of a training epoch, before callbacks that monitor what it logs.

    Lightning calls only these two kinds of callbacks there. One of our own would become what the user finds as
    `Trainer.early_stopping_callback` or `checkpoint_callback`, so the first one's hook is wrapped.
    """
    first = next((one for one in callbacks if isinstance(one, EarlyStopping | Checkpoint)), None)
    if first is not None:
        hook = first.on_train_epoch_end

        def on_train_epoch_end(*args: Any, **kwargs: Any) -> None:
            call()
            hook(*args, **kwargs)

        _replace(stack, first, "on_train_epoch_end", on_train_epoch_end)


def _sync(metric: Metric, metric_sync: MetricSync, *args: Any, **kwargs: Any) -> None:
    metric_sync.sync(metric, *args, **kwargs)


def _skip_borrowed_batches(stack: ExitStack, writer: BasePredictionWriter, borrows: Callable[[], bool]) -> None:
    hook = writer.on_predict_batch_end

    def on_predict_batch_end(*args: Any, **kwargs: Any) -> None:
        if not borrows():
            hook(*args, **kwargs)

    _replace(stack, writer, "on_predict_batch_end", on_predict_batch_end)


def _remove_callbacks(trainer: "pl.Trainer", own: Sequence[Callback]) -> None:
    callbacks = vars(trainer)["callbacks"]  # a new list where another run begins before this one was ended
    callbacks[:] = [one for one in callbacks if not any(one is mine for mine in own)]
