"""When ranks exchange logged values, so that callbacks, schedulers and loggers use the same values on all ranks."""
# ruff: noqa: SLF001 - it replaces private parts of a Trainer; a test guards them

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _OUT_DICT, _ResultCollection
from torch import Tensor
from typing_extensions import override

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step.loss_count import find_loss_counter
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.trainer.results import EvaluationResults, MetricExchange, SynchronizedResults
from lightning_hetero.trainer.torchmetrics import MetricSync
from lightning_hetero.trainer.training_results import TrainingResults


class SynchronizedLoggerConnector(_LoggerConnector):
    """Lightning's logger connector; wherever its values are used, they are those over all ranks.

    In training, ranks exchange at the end of a batch after which values are used: before its hooks, and after them if
    the hooks log values; and before and after the hooks at the end of an epoch. In evaluation, where ranks may have
    different numbers of batches, they exchange only before and after the hooks at its end.
    """

    def __init__(self, connector: _LoggerConnector, metrics: MetricSync) -> None:
        super().__init__(connector.trainer)
        vars(self).update(vars(connector))  # continues with the state of Lightning's own
        self._metrics = metrics
        self._values_used = False  # after the current step
        self._batch_end_exchanged = False  # once, so that all ranks know the keys that hooks at a batch's end log
        self._batches_exchanged = False  # in evaluation: what batches have logged; the hooks at its end follow
        self._first_before_end: bool | None = None  # Lightning's `_first_loop_iter` before a loader's end

    @override
    def reset_results(self) -> None:
        """A run, an evaluation or a training epoch begins or ends."""
        self._metrics.attach(self.trainer.lightning_module)
        super().reset_results()

    @override
    def on_batch_start(self, batch: Any, dataloader_idx: int | None = None) -> None:
        if self._first_loop_iter is None:  # hooks at the start of an epoch or evaluation may make metrics
            self._metrics.attach(self.trainer.lightning_module)
        super().on_batch_start(batch, dataloader_idx)

    # ---- training ----

    def exchange_steps(self, results: TrainingResults) -> None:
        """The training step is over on all ranks, and the hooks at the end of the batch follow."""
        self._values_used = self._uses_values()
        if self._values_used and not self.trainer.interrupted:
            results.exchange_steps()

    def exchange_epoch(self, results: SynchronizedResults) -> None:
        """The loop has no more batches on any rank."""
        if not self.trainer.interrupted:
            results.exchange_epoch()

    @override
    def on_batch_end(self) -> None:
        results = self.trainer._results
        if self._values_used and isinstance(results, TrainingResults) and not self.trainer.interrupted:
            # The first time, no rank knows whether others log values in these hooks.
            logged = any(key.meta.on_step and key.meta.fx == "on_train_batch_end" for key in results.logged_keys)
            if not self._batch_end_exchanged or logged:
                results.exchange_steps()
            self._batch_end_exchanged = True
        super().on_batch_end()

    @override
    def update_train_step_metrics(self) -> None:
        # Lightning logs once more when it has to stop, which other ranks may not know of.
        if self._values_used:
            super().update_train_step_metrics()
        self._values_used = False

    def _uses_values(self) -> bool:
        """Whether loggers, schedulers or callbacks take values after this step; the same on all ranks."""
        trainer, loop = self.trainer, self.trainer.fit_loop.epoch_loop
        automatic = trainer.lightning_module.automatic_optimization
        if automatic and loop._should_accumulate():
            return False
        every = trainer.log_every_n_steps  # type: ignore[attr-defined] # set where mypy can't see it
        logs = every > 0 and (loop._batches_that_stepped + 1) % every == 0
        schedules = automatic and any(
            config.reduce_on_plateau and config.interval == "step" and (loop.batch_idx + 1) % config.frequency == 0
            for config in trainer.lr_scheduler_configs
        )
        saves = any(
            callback.monitor is not None
            and (
                callback._train_time_interval is not None  # due by rank 0's clock, at a step that others can't know
                or (callback._every_n_train_steps > 0 and trainer.global_step % callback._every_n_train_steps == 0)
            )
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
        )
        # What the last step has logged is still read when the epoch is over.
        last = loop.batch_progress.current.ready == trainer.num_training_batches
        return bool(logs or last or trainer.fast_dev_run or schedules or saves)  # type: ignore[attr-defined] # the same

    # ---- evaluation ----

    @override
    def epoch_end_reached(self) -> None:
        self._first_before_end = self._first_loop_iter
        super().epoch_end_reached()

    @override
    def _evaluation_epoch_end(self) -> None:
        """This rank has no more batches, and the hooks at the end of the evaluation follow."""
        self._metrics.attach(self.trainer.lightning_module)
        loop, results = self.trainer._evaluation_loop, self.trainer._results
        assert isinstance(results, EvaluationResults)
        self.exchange_epoch(results)
        several = loop._is_sequential and loop.num_dataloaders > 1
        loaders = [i for i, batches in enumerate(loop.max_batches) if batches] if several else [None]
        outputs = []
        for index in loaders:
            results.dataloader_idx = index
            outputs.append(super().update_eval_epoch_metrics())
        loop._logged_outputs = outputs  # of all loaders, also those of which this rank has had no batch
        self._batches_exchanged = True
        super()._evaluation_epoch_end()

    @override
    def update_eval_epoch_metrics(self) -> _OUT_DICT:
        if self._batches_exchanged:
            self._batches_exchanged = False
            return super().update_eval_epoch_metrics()
        results = self.trainer._results
        assert isinstance(results, EvaluationResults)
        results.end_loader()
        # The evaluation goes on: what the next loader logs must not reset what this one has logged.
        self._first_loop_iter = self._first_before_end
        return {}

    @override
    def on_epoch_end(self) -> None:
        """The hooks at the end of an epoch or of an evaluation are over, and may have logged values."""
        results = self.trainer._results
        assert isinstance(results, SynchronizedResults)
        self.exchange_epoch(results)
        super().on_epoch_end()


class MetricSynchronizer:
    """Synchronizes a run's logged values and torchmetrics over all ranks.

    It makes the replacements for parts of the Trainer, which `patch_trainer` puts in place. With one rank only the
    collection of the training loop is replaced.

    Args:
        trainer: whose run begins; its module is connected.
        group: of all ranks.
        timer: of this rank's compute time.
        device: of this rank.
        loss_count: the user's function of the module and a batch, if any.
        in_evaluation_batch: whether this rank is in a hook of an evaluation batch, which other ranks may not have.

    Attributes:
        training_results: the collection of the training loop.
        evaluation_results: the collections of the loops of validation in `fit`, of `validate`, and of `test`.
        connector: replaces the Trainer's logger connector.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        group: RankGroup,
        timer: ComputeTimer,
        device: torch.device,
        *,
        loss_count: Callable[[Any, Any], float | Tensor] | None,
        in_evaluation_batch: Callable[[], bool],
    ) -> None:
        module = trainer.lightning_module

        def count(batch: Any) -> float | Tensor:  # the rule is looked up each time, since criteria may change
            return find_loss_counter(module, loss_count)(module, batch)

        self._trainer, self._group, self._timer = trainer, group, timer
        self._is_due = trainer.fit_loop.epoch_loop._should_check_val_fx
        self._metrics = MetricSync(group, timer, in_evaluation_batch)
        self.connector: _LoggerConnector = trainer._logger_connector
        self._lightnings_connector = self.connector
        exchange = MetricExchange(group, timer, trainer.strategy.reduce, module, device)
        self.training_results = TrainingResults(exchange)
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        self.evaluation_results: tuple[_ResultCollection, ...] = tuple(loop._results for loop in loops)
        if exchange.is_needed:
            self.evaluation_results = tuple(EvaluationResults(exchange, count) for _ in loops)
            self.connector = SynchronizedLoggerConnector(self.connector, self._metrics)

    def begin_batch(self, samples: int | None, before_borrowed: ModuleSnapshot | None) -> None:
        """A training batch was loaded.

        Args:
            samples: of this rank's own that it holds; None if their number is not known.
            before_borrowed: the module before it computes borrowed samples; None if it has its own.
        """
        self.training_results.begin_batch(samples)
        self._metrics.begin_batch(before_borrowed)

    def end_batch(self, loss_weight: float | Tensor | None) -> None:
        """The training step is over, and the hooks at the end of its batch follow; see `TrainingResults.end_batch`."""
        self._metrics.end_batch()
        self.training_results.end_batch(loss_weight)
        if isinstance(self.connector, SynchronizedLoggerConnector):
            self.connector.exchange_steps(self.training_results)

    def exchange_epoch(self) -> None:
        """On all ranks, the training epoch has no more batches, or its hooks may have logged values."""
        if isinstance(self.connector, SynchronizedLoggerConnector):
            self.connector.exchange_epoch(self.training_results)

    def is_validation_due(self, *args: Any, **kwargs: Any) -> bool:
        """In place of Lightning's; where time decides, rank 0's clock does, since clocks differ."""
        due = self._is_due(*args, **kwargs)
        if self._trainer._val_check_time_interval is None:  # type: ignore[attr-defined] # set where mypy can't see it
            return due
        with self._timer.waiting():
            return self._group.broadcast(due)

    def close(self) -> None:
        """The run is over: restore torchmetrics and Lightning's connector, with our connector's state; idempotent."""
        if isinstance(self.connector, SynchronizedLoggerConnector):
            state, own = vars(self.connector), vars(self._lightnings_connector)
            own.update({name: state[name] for name in own})  # Lightning's continues with it
            self.connector = self._lightnings_connector
        self._metrics.detach()
