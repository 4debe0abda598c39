"""Prepares the loaders of a Trainer: a copy of the user's loader, in which only the batch sampler is ours.

Lightning injects its own sampler before it calls the strategy, and loaders may be built as early as the user's `setup`.
So the method that prepares a loader is replaced on the strategy's Trainer.
"""
# ruff: noqa: SLF001 - a test guards the Trainer's private names used here

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops import _EvaluationLoop, _PredictionLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import Grouping, Index
from lightning_hetero.sampling.random_state import SeparateRandomState
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.training_loaders import TrainingLoaders, epoch_of
from lightning_hetero.trainer.user_loader import (
    agreed_batches,
    has_plain_batches,
    is_distributed,
    lost_geographic_sampler,
    name_of,
    replace_batch_sampler,
    require_same_loader,
    users_loader,
)


class TrainerDataLoaders:
    """Prepares all loaders of one call of a Trainer; `seed`: see `TrainingLoaders`."""

    def __init__(self, trainer: "pl.Trainer", job: Job, training: TrainingLoaders, seed: int) -> None:
        self._trainer, self._job, self._training, self._seed = trainer, job, training, seed
        self._lightnings_prepare = trainer._data_connector._prepare_dataloader

    def prepare(self, dataloader: object, shuffle: bool, mode: RunningStage) -> object:
        """Called by Lightning for every loader, on all ranks; a ValueError says why one can't be split."""
        loader = users_loader(dataloader)
        overfits: float = vars(self._trainer)["overfit_batches"]  # Lightning sets it without declaring it
        if overfits and isinstance(loader, DataLoader) and lost_geographic_sampler(loader):
            raise ValueError(
                "overfit_batches replaces the geographic sampler by plain numbers, which "
                f"{name_of(loader.dataset)} can't be indexed with: use limit_train_batches instead"
            )
        if mode == RunningStage.TRAINING:
            return self._training.prepare(loader)
        return self._prepare_evaluation(loader, shuffle, mode) if isinstance(loader, DataLoader) else loader

    def _prepare_evaluation(self, loader: DataLoader[Any], shuffle: bool, stage: RunningStage) -> object:
        """Each rank evaluates a part of the loader's own batches, unless the user shards them."""
        source: Any = loader.batch_sampler
        predicts = stage == RunningStage.PREDICTING
        if self._training.user_shards or is_distributed(loader):
            wraps = predicts and source is not None
            return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(source)) if wraps else loader
        if isinstance(loader.dataset, IterableDataset):
            return self._lightnings_prepare(loader, shuffle, stage)
        if source is None:
            return self._lightnings_prepare(loader, False, stage)
        group = self._job.group
        require_same_loader(group, loader, f"the {stage.dataloader_prefix} data")
        grouping, plain = Grouping(1, batched=True, finite=True), has_plain_batches(loader)
        if plain:
            # Like Lightning, predict a last batch that is not full even with `drop_last`.
            grouping = Grouping(source.batch_size, drop_last=source.drop_last and not predicts, finite=True)
            source = source.sampler
        batches = agreed_batches(group, source, grouping, self._seed)
        passes = _StagePasses(self._trainer, stage, self._job.evaluation)
        fit_in_a_batch = _Collation(loader, group, self._seed)
        sampler = EvaluationSampler(batches, group.rank, passes, equal=plain, fit_in_a_batch=fit_in_a_batch)
        return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(sampler) if predicts else sampler)


@dataclass
class _Collation:
    """Whether samples of a loader fit in one batch: rank 0 tries it once, under a random state of its own."""

    loader: DataLoader[Any]
    group: RankGroup
    seed: int
    _answer: bool | None = field(default=None, init=False)

    def __call__(self, indices: Sequence[Index]) -> bool:
        if self._answer is None:
            self._answer = self.group.from_rank_zero(lambda: self._collates(indices))
        return self._answer

    def _collates(self, indices: Sequence[Index]) -> bool:
        try:
            with SeparateRandomState(self.seed).active():
                self.loader.collate_fn([self.loader.dataset[index] for index in indices])
        except Exception:  # noqa: BLE001 - whatever a user's code raises
            return False
        return True


@dataclass(frozen=True)
class _StagePasses:
    """Implements `EvaluationPasses` for the evaluations of one stage."""

    trainer: "pl.Trainer"
    stage: RunningStage
    balancer: EvaluationBalancer

    @property
    def world_size(self) -> int:
        return self.trainer.world_size

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
        side_by_side = combined._mode != "sequential"
        return Scope(0 if side_by_side else numbers[0], int(loop.max_batches[numbers[0]]), side_by_side)

    def _loop(self) -> _EvaluationLoop | _PredictionLoop:
        if self.stage == RunningStage.PREDICTING:
            return self.trainer.predict_loop
        if self.stage == RunningStage.TESTING:
            return self.trainer.test_loop
        fits = self.trainer.state.fn == TrainerFn.FITTING
        return self.trainer.fit_loop.epoch_loop.val_loop if fits else self.trainer.validate_loop

    def splits(self, scope: Scope, sizes: Sequence[int]) -> Sequence[Sequence[int]]:
        return self.balancer.splits(self.stage, scope, sizes)

    def begin(self, scope: Scope, local_batches: Sequence[int]) -> None:
        self.balancer.begin(self.stage, scope, local_batches)
