"""What callbacks, schedulers and loggers use in a run has one value on all ranks."""
# ruff: noqa: SLF001 - it stands in for parts of a Trainer; a test guards what it touches

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step.loss_count import find
from lightning_hetero.trainer.logger_connector import SynchronizedLoggerConnector
from lightning_hetero.trainer.results import EvaluationResults, MetricExchange
from lightning_hetero.trainer.step_logging import StepLogging
from lightning_hetero.trainer.torchmetrics import MetricSync


class MetricSynchronizer:
    """A run's logged values and torchmetrics over all ranks.

    It makes what stands in for parts of the Trainer; `patch_trainer` puts them there. With one rank it is only about
    what a training step logs, and everything else is Lightning's own.

    Args:
        trainer: whose run begins, with its module.
        group: of all ranks.
        timer: of this rank's compute time.
        device: of this rank.
        loss_count: the user's, from the module and a batch, if any.
        in_evaluation_batch: whether the rank is in an evaluation step, which other ranks may not have.

    Attributes:
        step_logging: for the training steps.
        evaluation_results: collections of the loops that validate in a fit, validate, and test.
        connector: in place of the Trainer's.
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

        def count(batch: Any) -> float | Tensor:  # the rule is found each time, since criteria may change
            return find(module, loss_count)(module, batch)

        self._trainer, self._group, self._timer = trainer, group, timer
        self._is_due = trainer.fit_loop.epoch_loop._should_check_val_fx
        self._metrics = MetricSync(group, timer, in_evaluation_batch)
        self.connector: _LoggerConnector = trainer._logger_connector
        self._lightnings_connector = self.connector
        exchange = MetricExchange(group, timer, trainer.strategy.reduce, module, device)
        self.step_logging = StepLogging(exchange)
        loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
        self.evaluation_results: tuple[_ResultCollection, ...] = tuple(loop._results for loop in loops)
        if exchange.is_needed:
            self.evaluation_results = tuple(EvaluationResults(exchange, count) for _ in loops)
            self.connector = SynchronizedLoggerConnector(self.connector, self._metrics)

    def batch_over(self, loss_weight: float | Tensor | None) -> None:
        """The training step is over, and the hooks at the end of its batch follow; see `StepLogging.batch_over`."""
        self.step_logging.batch_over(loss_weight)
        if isinstance(self.connector, SynchronizedLoggerConnector):
            self.connector.exchange_steps(self.step_logging.results)

    def epoch_over(self) -> None:
        """The training epoch has no more batches, or its hooks may have logged values: on all ranks."""
        if isinstance(self.connector, SynchronizedLoggerConnector):
            self.connector.exchange_epoch(self.step_logging.results)

    def is_validation_due(self, *args: Any, **kwargs: Any) -> bool:
        """In place of Lightning's; where the time decides, the first rank does: no two clocks are the same."""
        due = self._is_due(*args, **kwargs)
        if self._trainer._val_check_time_interval is None:  # type: ignore[attr-defined] # set where mypy can't see it
            return due
        with self._timer.waiting():
            return self._group.broadcast(due)

    def close(self) -> None:
        """The run is over: torchmetrics and Lightning's connector are as if it had been theirs alone; idempotent."""
        if isinstance(self.connector, SynchronizedLoggerConnector):
            self.connector.hand_back(self._lightnings_connector)
            self.connector = self._lightnings_connector
        self._metrics.detach()
