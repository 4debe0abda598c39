"""Prepares the loaders of validation, test and prediction: each rank evaluates a part of the loader's own batches."""
# ruff: noqa: SLF001 - what is read of a Trainer's loops is guarded by tests

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loops import _EvaluationLoop, _PredictionLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.utils.data import DataLoader

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import Grouping
from lightning_hetero.trainer.epoch import epoch_of
from lightning_hetero.trainer.loader_agreement import agreed_batches, require_same_loader
from lightning_hetero.trainer.user_loader import has_plain_batches, replace_batch_sampler


class EvaluationTimes(Protocol):
    """What is known of the time that evaluation batches take."""

    def seconds(self, stage: RunningStage, scope: Scope, samples: int, /) -> Sequence[float]:
        """What a batch of so many samples takes on each rank, W numbers, of which only the ratios matter."""

    def begin(self, stage: RunningStage, scope: Scope, sizes: Sequence[int], /) -> None:
        """This rank begins with batches of these sizes."""


@dataclass(frozen=True)
class EvaluationLoaders:
    """Prepares the evaluation loaders of one call of a Trainer.

    Args:
        trainer: whose.
        group: of all ranks.
        seed: of all passes over samplers, shared by all ranks.
        times: how long batches take.
    """

    trainer: "pl.Trainer"
    group: RankGroup
    seed: int
    times: EvaluationTimes

    def prepare(self, loader: DataLoader[Any], stage: RunningStage) -> DataLoader[Any]:
        """The user's loader, drawing what this rank evaluates; on all ranks alike.

        Raises:
            ValueError: it is not the same on all ranks, or has nothing to draw from.
        """
        require_same_loader(self.group, loader, f"the {stage.dataloader_prefix} data")
        predicts = stage == RunningStage.PREDICTING
        source: Any = loader.batch_sampler
        grouping = Grouping(1, batched=True, finite=True)
        if has_plain_batches(loader):
            # Lightning predicts a last batch that is not full too, whatever the loader says.
            grouping = Grouping(source.batch_size, drop_last=source.drop_last and not predicts, finite=True)
            source = source.sampler
        batches = agreed_batches(self.group, source, grouping, self.seed)
        sampler = EvaluationSampler(batches, self.group.rank, _StagePasses(self.trainer, stage, self.times))
        return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(sampler) if predicts else sampler)


@dataclass(frozen=True)
class _StagePasses:
    """The passes of one stage's evaluations; see `EvaluationPasses`."""

    trainer: "pl.Trainer"
    stage: RunningStage
    times: EvaluationTimes

    def epoch(self) -> int:
        return epoch_of(self.trainer)

    def scope(self, sampler: EvaluationSampler) -> Scope:
        return scope_of(self.trainer, self.stage, sampler)

    def seconds(self, scope: Scope, samples: int) -> Sequence[float]:
        return self.times.seconds(self.stage, scope, samples)

    def begin(self, scope: Scope, sizes: Sequence[int]) -> None:
        self.times.begin(self.stage, scope, sizes)


def _loop(trainer: "pl.Trainer", mode: RunningStage) -> _EvaluationLoop | _PredictionLoop:
    """The loop that evaluates in a stage."""
    if mode == RunningStage.PREDICTING:
        return trainer.predict_loop
    if mode == RunningStage.TESTING:
        return trainer.test_loop
    return trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == TrainerFn.FITTING else trainer.validate_loop


def scope_of(trainer: "pl.Trainer", mode: RunningStage, sampler: EvaluationSampler) -> Scope:
    """How much of the sampler's loader the run that is about to begin takes; see `Scope`."""
    loop = _loop(trainer, mode)
    combined = loop._combined_loader
    if combined is None:
        return Scope()
    samplers = [getattr(loader, "batch_sampler", None) for loader in combined.flattened]
    numbers = [n for n, own in enumerate(samplers) if sampler in (own, getattr(own, "_batch_sampler", None))]
    if not numbers:
        return Scope()
    number = numbers[0]
    limit = int(loop.max_batches[number])
    if combined._mode == "sequential":
        return Scope(number, limit)
    finite = [int(batches) for batches in loop.max_batches if batches != float("inf")]
    steps = min(finite) if combined._mode == "min_size" else max(finite)
    return Scope(0, limit, steps, cycles=combined._mode == "max_size_cycle")
