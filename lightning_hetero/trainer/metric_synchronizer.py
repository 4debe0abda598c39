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

    In training, ranks exchange at the end of a batch after which values are used, or in which a rank has logged new
    keys: before its hooks, and after them if the hooks log values; and before and after the hooks at the end of an
    epoch. In evaluation they exchange at the end of each loader, and after the hooks at the end.
    """

    def __init__(self, connector: _LoggerConnector, all_have_new_keys: Callable[[], bool]) -> None:
        super().__init__(connector.trainer)
        vars(self).update(vars(connector))  # continues with the state of Lightning's own
        self._all_have_new_keys = all_have_new_keys
        self._values_used = False  # after the current step
        self._batch_end_exchanged = False  # once, so that all ranks know the keys that hooks at a batch's end log
        self._loaders_evaluated = False  # the hooks at the end of the evaluation follow, or are over

    @override
    def reset_results(self) -> None:
        """A run, an evaluation or a training epoch begins or ends."""
        super().reset_results()
        if isinstance(results := self.trainer._results, SynchronizedResults):
            results.begin_epoch()

    # ---- training ----

    def exchange_steps(self, results: TrainingResults) -> None:
        """The training step is over on all ranks, and the hooks at the end of the batch follow."""
        self._values_used = self._uses_values()
        due = self._values_used or results.needs_exchange
        if not self.trainer.interrupted and (due or (results.has_new_keys and self._all_have_new_keys())):
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
        if isinstance(results, EvaluationResults):
            results.end_batch()
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
    def _evaluation_epoch_end(self) -> None:
        """All loaders are evaluated, and the hooks at the end of the evaluation follow."""
        self._loaders_evaluated = True
        super()._evaluation_epoch_end()

    @override
    def update_eval_epoch_metrics(self) -> _OUT_DICT:
        """A loader is evaluated; or the hooks at the evaluation's end are over, whose values were exchanged before."""
        results = self.trainer._results
        assert isinstance(results, EvaluationResults)
        if not self._loaders_evaluated:
            self.exchange_epoch(results)
        self._loaders_evaluated = False
        return super().update_eval_epoch_metrics()

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
        all_have_new_keys: asks the other ranks after a step in which this rank has logged a key for the first time.

    Attributes:
        training_results: the collection of the training loop.
        evaluation_results: the collections of the loops of validation in `fit`, of `validate`, and of `test`.
        connector: replaces the Trainer's logger connector.
        metric_sync: synchronizes torchmetrics; None with one rank.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        group: RankGroup,
        timer: ComputeTimer,
        device: torch.device,
        *,
        loss_count: Callable[[Any, Any], float | Tensor] | None,
        all_have_new_keys: Callable[[], bool],
    ) -> None:
        module = trainer.lightning_module

        def count(batch: Any) -> float | Tensor:  # the rule is looked up each time, since criteria may change
            return find_loss_counter(module, loss_count)(module, batch)

        self._trainer, self._group, self._timer = trainer, group, timer
        self._is_due = trainer.fit_loop.epoch_loop._should_check_val_fx
        self.metric_sync = MetricSync(group, timer) if group.world_size > 1 else None
        self.connector: _LoggerConnector = trainer._logger_connector
        self._lightnings_connector = self.connector
        exchange = MetricExchange(group, timer, trainer.strategy.reduce, module, device)
        self.training_results = TrainingResults(exchange, self.metric_sync)
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        self.evaluation_results: tuple[_ResultCollection, ...] = tuple(loop._results for loop in loops)
        if self.metric_sync is not None:
            self.evaluation_results = tuple(EvaluationResults(exchange, self.metric_sync, count) for _ in loops)
            self.connector = SynchronizedLoggerConnector(self.connector, all_have_new_keys)

    def begin_evaluation_batch(self, samples: int | None) -> None:
        """A batch of an evaluation begins; see `EvaluationBalancer.begin_batch`."""
        if isinstance(results := self._trainer._results, EvaluationResults):
            results.begin_batch(samples)

    def begin_batch(self, batch: Any, samples: int | None, before_borrowed: ModuleSnapshot | None) -> None:
        """A training batch was loaded.

        Args:
            batch: as it was loaded.
            samples: of this rank's own that it holds; None if their number is not known.
            before_borrowed: the module before it computes borrowed samples; None if it has its own.
        """
        self.training_results.count_batch(batch, samples)
        if self.metric_sync is not None:
            self.metric_sync.begin_batch(before_borrowed)

    def end_batch(self, loss_weight: float | Tensor | None) -> None:
        """The training step is over, and the hooks at the end of its batch follow; see `TrainingResults.end_batch`."""
        if self.metric_sync is not None:
            self.metric_sync.end_batch()
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
        """The run is over: restore Lightning's connector, with our connector's state; idempotent."""
        if isinstance(self.connector, SynchronizedLoggerConnector):
            state, own = vars(self.connector), vars(self._lightnings_connector)
            own.update({name: state[name] for name in own})  # Lightning's continues with it
            self.connector = self._lightnings_connector
