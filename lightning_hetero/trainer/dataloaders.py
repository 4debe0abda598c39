"""Prepares the loaders of a Trainer: a copy of the user's loader, in which only the batch sampler is ours.

Lightning injects its own sampler before it calls the strategy, and loaders may be built as early as the user's `setup`.
So the method that prepares a loader is replaced on the strategy's Trainer.
"""
# ruff: noqa: SLF001 - a test guards the Trainer's private names used here

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops import _EvaluationLoop, _PredictionLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import Grouping
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.training_loaders import TrainingLoaders, epoch_of
from lightning_hetero.trainer.user_loader import (
    agreed_batches,
    has_plain_batches,
    lost_geographic_sampler,
    name_of,
    replace_batch_sampler,
    require_same_loader,
    users_loader,
    without_shards,
)


class TrainerDataLoaders:
    """Prepares all loaders of one call of a Trainer; `seed`: see `TrainingLoaders`."""

    def __init__(self, trainer: "pl.Trainer", job: Job, training: TrainingLoaders, seed: int) -> None:
        self._trainer, self._job, self._training, self._seed = trainer, job, training, seed
        self._lightnings_prepare = trainer._data_connector._prepare_dataloader
        self._told_unsharded = False

    def prepare(self, dataloader: object, shuffle: bool, mode: RunningStage) -> object:
        """Called by Lightning for every loader, on all ranks; a ValueError says why one can't be split."""
        loader = users_loader(dataloader)
        overfits: float = vars(self._trainer)["overfit_batches"]  # Lightning sets it without declaring it
        if overfits and isinstance(loader, DataLoader) and lost_geographic_sampler(loader):
            raise ValueError(
                "overfit_batches replaces the geographic sampler by plain numbers, which "
                f"{name_of(loader.dataset)} can't be indexed with: use limit_train_batches instead"
            )
        if isinstance(loader, DataLoader) and not self._training.user_shards:
            loader = self._without_shards(loader)
        if mode == RunningStage.TRAINING:
            return self._training.prepare(loader)
        return self._prepare_evaluation(loader, shuffle, mode) if isinstance(loader, DataLoader) else loader

    def _without_shards(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        whole = without_shards(loader, self._job.group.world_size)
        if whole is not loader and not self._told_unsharded:
            self._told_unsharded = True
            rank_zero_info(
                "hetero: the strategy splits what the DistributedSampler of your loader draws on all ranks together, "
                "by shares and without padding; Trainer(use_distributed_sampler=False) leaves it alone"
            )
        return whole

    def _prepare_evaluation(self, loader: DataLoader[Any], shuffle: bool, stage: RunningStage) -> object:
        """Each rank evaluates a part of the loader's own batches, unless the user shards them."""
        source: Any = loader.batch_sampler
        predicts = stage == RunningStage.PREDICTING
        if self._training.user_shards:
            wraps = predicts and source is not None
            return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(source)) if wraps else loader
        if isinstance(loader.dataset, IterableDataset):
            return self._lightnings_prepare(loader, shuffle, stage)
        if source is None:
            return self._lightnings_prepare(loader, False, stage)
        group = self._job.group
        require_same_loader(group, loader, f"the {stage.dataloader_prefix} data")
        grouping = Grouping(1, batched=True, finite=True)
        if has_plain_batches(loader):
            # Like Lightning, predict a last batch that is not full even with `drop_last`.
            grouping = Grouping(source.batch_size, drop_last=source.drop_last and not predicts, finite=True)
            source = source.sampler
        batches = agreed_batches(group, source, grouping, self._seed, loader)
        sampler = EvaluationSampler(batches, group.rank, _StagePasses(self._trainer, stage, self._job.evaluation))
        return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(sampler) if predicts else sampler)


@dataclass(frozen=True)
class _StagePasses:
    """Implements `EvaluationPasses` for the evaluations of one stage."""

    trainer: "pl.Trainer"
    stage: RunningStage
    balancer: EvaluationBalancer

    def epoch(self) -> int:
        return epoch_of(self.trainer)

    def scope(self, sampler: EvaluationSampler) -> Scope:
        loop = self._loop()
        combined = loop._combined_loader
        if combined is None:
            return Scope()
        samplers = [getattr(loader, "batch_sampler", None) for loader in combined.flattened]
        numbers = [n for n, own in enumerate(samplers) if sampler in (own, getattr(own, "_batch_sampler", None))]
        if not numbers:
            return Scope()
        limit = int(loop.max_batches[numbers[0]])
        if combined._mode == "sequential":
            return Scope(numbers[0], limit)
        finite = [int(batches) for batches in loop.max_batches if batches != float("inf")]
        steps = min(finite) if combined._mode == "min_size" else max(finite)
        return Scope(0, limit, steps, cycles=combined._mode == "max_size_cycle")

    def _loop(self) -> _EvaluationLoop | _PredictionLoop:
        if self.stage == RunningStage.PREDICTING:
            return self.trainer.predict_loop
        if self.stage == RunningStage.TESTING:
            return self.trainer.test_loop
        fits = self.trainer.state.fn == TrainerFn.FITTING
        return self.trainer.fit_loop.epoch_loop.val_loop if fits else self.trainer.validate_loop

    def seconds(self, scope: Scope, samples: int) -> Sequence[float]:
        return self.balancer.seconds(self.stage, scope, samples)

    def begin(self, scope: Scope, sizes: Sequence[int]) -> None:
        self.balancer.begin(self.stage, scope, sizes)
