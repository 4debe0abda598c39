"""The points at which all ranks agree on what was logged, and what stands in for Lightning's own there.

Training: before the hooks at the end of a batch, where its values are looked at, and after them, if values are logged
there; before and after the hooks at the end of an epoch. Evaluation: the same at the end of a run; ranks may have
different numbers of batches in it, so there is no other point.
"""
# ruff: noqa: SLF001 - that is what this room is for; a test guards what it touches

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loops import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _METRICS,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor
from torchmetrics import Metric

from lightning_hetero.step.loss_count import find, sample_count
from lightning_hetero.trainer.patches import Patch, following
from lightning_hetero.trainer.results import MetricExchange, SynchronizedResults

_LATE = "on_train_batch_end"


def without_exchange(metric: _ResultMetric) -> None:
    """Updates of a value no longer communicate, also with `sync_dist`: other ranks may have none at that moment."""
    metric.meta.sync._fn = _Sync.no_op


class EvaluationLogging:
    """Stands between `self.log` and the collection of an evaluation loop.

    A mean that is NaN is left out where nothing of the batch counts.

    Args:
        results: the loop's.
        count: from a batch to its loss count.
    """

    def __init__(self, results: _ResultCollection, count: Callable[[Any], float | Tensor]) -> None:
        self._results = results
        self._count = count
        self._counted: tuple[Any, float | Tensor] = (None, 1.0)

    def update(self, key: str, value: Any, batch_size: int) -> None:
        """What the collection calls for every logged value; see `_ResultCollection.update_metrics`."""
        metric = self._results[key]
        without_exchange(metric)
        metric.has_reset = False
        weight: Any = batch_size
        if not isinstance(value, Metric) and metric.meta.is_mean_reduction and self._results.batch is not None:
            if value.device.type == "cpu":
                if not bool(torch.isfinite(value)) and not self._counts():
                    metric._update_count += 1
                    return
            elif isinstance(count := self._counts(), Tensor):
                kept = (count.to(value.device) > 0) | torch.isfinite(value)
                value, weight = torch.where(kept, value, torch.zeros_like(value)), kept * batch_size
        metric.forward(value, weight)

    def _counts(self) -> float | Tensor:
        batch = self._results.batch
        if self._counted[0] is not batch:
            try:
                self._counted = batch, self._count(batch)
            except Exception:  # noqa: BLE001 - a user's rule for training batches need not know those of evaluation
                self._counted = batch, 1.0
        return self._counted[1]


class MetricSynchronizer:
    """What callbacks, schedulers and loggers look at in a run has one value on all ranks.

    Args:
        trainer: whose.
        talk: with the other ranks.
        given: the user's loss count, if any.
        take_over_metrics: called when evaluation is over, for metrics that the module's hooks have made since it began.
    """

    def __init__(
        self,
        trainer: "pl.Trainer",
        talk: MetricExchange,
        given: Callable[[Any, Any], float | Tensor] | None,
        take_over_metrics: Callable[[], None],
    ) -> None:
        def count(batch: Any) -> float | Tensor:  # found each time, since criteria may change
            return find(talk.module, given, sample_count)(talk.module, batch)

        self._trainer = trainer
        self._talk = talk
        self._take_over_metrics = take_over_metrics
        self._results = trainer.fit_loop.epoch_loop._results
        self.training = SynchronizedResults(self._results, talk)
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        self._evaluations = [
            (loop, SynchronizedResults(loop._results, talk), EvaluationLogging(loop._results, count)) for loop in loops
        ]
        self._looked_at = self._looked_before = False

    def patches(self) -> list[Patch]:
        """What to set on the Trainer; see `TrainerPatches`."""
        connector, epoch_loop = self._trainer._logger_connector, self._trainer.fit_loop.epoch_loop
        patches: list[Patch] = [
            (connector, "on_epoch_end", following(self._after_hooks, connector.on_epoch_end)),
            (connector, "on_batch_end", following(self._after_batch_hooks, connector.on_batch_end)),
            (connector, "update_train_step_metrics", self._log_step(connector.update_train_step_metrics)),
            (self._results, "_get_cache", self.training.cached),
            (epoch_loop, "_should_check_val_fx", self._same_time(epoch_loop._should_check_val_fx)),
        ]
        if self._talk.exchange.rank == 0:
            patches.append((self._results, "metrics", self._metrics))
        for loop, shared, logging in self._evaluations:
            patches += [
                (loop._results, "_get_cache", shared.cached),
                (loop._results, "update_metrics", logging.update),
                (loop, "_store_dataloader_outputs", shared.loader_over),
                (loop, "on_run_end", following(self._before_evaluation_hooks(loop, shared), loop.on_run_end)),
            ]
        callbacks: list[Callback] = getattr(self._trainer, "callbacks")  # noqa: B009 - set where mypy can't see it
        # These see what the module logs in its own hook, so they come after all others.
        first = next((callback for callback in callbacks if isinstance(callback, EarlyStopping | Checkpoint)), None)
        if first is not None:
            patches.append((first, "on_train_epoch_end", following(self.epoch_over, first.on_train_epoch_end)))
        return patches

    # ---- training ----

    def batch_over(self) -> None:
        """The training step is over, and the hooks at the end of the batch follow: on all ranks."""
        self._looked_at = self._is_looked_at()
        if self._looked_at and not self._trainer.interrupted:
            self.training.exchange_steps()

    def epoch_over(self) -> None:
        """The training epoch has no more batches: on all ranks."""
        if not self._trainer.interrupted:
            self.training.exchange_epoch()

    def _after_batch_hooks(self) -> None:
        if not self._looked_at or self._trainer._results is not self._results or self._trainer.interrupted:
            return
        # Only the first time nobody knows whether a rank logs values there.
        if not self._looked_before or any(key.on_step and key.fx == _LATE for key in self.training.keys):
            self.training.exchange_steps()
        self._looked_before = True

    def _same_time(self, is_due: Callable[..., bool]) -> Callable[..., bool]:
        """Whether validation is due; where the time decides, that of the first rank: no two clocks are the same."""

        def decided(*args: Any, **kwargs: Any) -> bool:
            due = is_due(*args, **kwargs)
            if self._trainer._val_check_time_interval is None:  # type: ignore[attr-defined] # set where mypy can't see it
                return due
            with self._talk.waiting():
                return self._talk.exchange.broadcast(due)

        return decided

    def _log_step(self, log: Callable[[], None]) -> Callable[[], None]:
        def logged() -> None:
            # Lightning logs once more when it is to stop, of which other ranks may not know.
            if self._looked_at:
                log()
            self._looked_at = False

        return logged

    def _is_looked_at(self) -> bool:
        """Whether loggers, schedulers or callbacks take values after this step; the same on all ranks."""
        trainer = self._trainer
        loop = trainer.fit_loop.epoch_loop
        module = trainer.lightning_module
        if module.automatic_optimization and loop._should_accumulate():
            return False
        every = trainer.log_every_n_steps  # type: ignore[attr-defined] # set where mypy can't see it
        logs = every > 0 and (loop._batches_that_stepped + 1) % every == 0
        schedules = module.automatic_optimization and any(
            config.reduce_on_plateau and config.interval == "step" and (loop.batch_idx + 1) % config.frequency == 0
            for config in trainer.lr_scheduler_configs
        )
        saves = any(
            callback.monitor is not None
            and (
                callback._train_time_interval is not None  # which step that is only rank 0's clock knows
                or (callback._every_n_train_steps > 0 and trainer.global_step % callback._every_n_train_steps == 0)
            )
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
        )
        # What the last step has logged is still seen when the epoch is over.
        last = loop.batch_progress.current.ready == trainer.num_training_batches
        return bool(logs or last or trainer.fast_dev_run or schedules or saves)  # type: ignore[attr-defined] # the same

    def _metrics(self, on_step: bool) -> _METRICS:
        """In place of the collection's: between exchanges the progress bar shows what this rank has."""
        metrics = _ResultCollection.metrics(self._results, on_step)
        if on_step:
            for metric, value in self.training.own_values():
                if metric.meta.prog_bar:
                    metrics["pbar"][self._results._forked_name(metric, on_step)[1]] = value.item()
        return metrics

    # ---- evaluation ----

    def _before_evaluation_hooks(self, loop: _EvaluationLoop, shared: SynchronizedResults) -> Callable[[], None]:
        def agree() -> None:
            self._take_over_metrics()
            connector = self._trainer._logger_connector
            connector.epoch_end_reached()
            if not self._trainer.interrupted:
                shared.exchange_epoch()
            several = loop._is_sequential and loop.num_dataloaders > 1
            loaders = [i for i, batches in enumerate(loop.max_batches) if batches] if several else [None]
            loop._logged_outputs = []
            for index in loaders:
                loop._results.dataloader_idx = index
                loop._logged_outputs.append(connector.update_eval_epoch_metrics())

        return agree

    def _after_hooks(self) -> None:
        """The hooks at the end of an epoch or of an evaluation are over, and may have logged values."""
        if self._trainer.interrupted:
            return
        if self._trainer._results is self._results:
            self.training.exchange_epoch()
        for loop, shared, _ in self._evaluations:
            if self._trainer._results is loop._results:
                shared.exchange_epoch()
