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
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import Grouping, Index
from lightning_hetero.sampling.random_state import SeparateRandomState
from lightning_hetero.trainer.counted_off import EvaluatedWhole, counted_off_sentence
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.training_loaders import TrainingLoaders, epoch_of
from lightning_hetero.trainer.user_loader import (
    agreed_batches,
    count_samples,
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
        self._whole = 0  # loaders that can't be cut

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
        if isinstance(loader, DataLoader) and not (self._is_split and isinstance(loader.dataset, IterableDataset)):
            return self._prepare_evaluation(loader, shuffle, mode)
        return self._whole_batches(loader, mode) if self._is_split else loader

    @property
    def _is_split(self) -> bool:
        """Whether there are several ranks, and the user does not shard the data."""
        return not self._training.user_shards and self._job.group.world_size > 1

    def _whole_batches(self, users: Any, stage: RunningStage) -> object:
        """What can't be cut: each rank evaluates whole batches, unless ranks have different ones."""
        self._whole += 1
        passes = _StagePasses(self._trainer, stage, self._job.evaluation)
        position = self._training.position
        loader = EvaluatedWhole(users, self._job.group, self._seed + self._whole, position, passes)
        if not loader.agrees(self._job.group):
            return loader.left_alone()
        subject = f"{name_of(getattr(users, 'dataset', users))} is iterable"
        rank_zero_info(counted_off_sentence(subject, self._job.group.world_size))
        return loader

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
        grouping, plain = Grouping(1, batched=True, finite=True), has_plain_batches(loader)
        if plain:
            # Like Lightning, predict a last batch that is not full even with `drop_last`.
            grouping = Grouping(source.batch_size, drop_last=source.drop_last and not predicts, finite=True)
            source = source.sampler
        batches = agreed_batches(group, source, grouping, self._seed, loader)
        passes = _StagePasses(self._trainer, stage, self._job.evaluation)
        fit_in_a_batch = _Collation(loader, group, self._seed)
        sampler = EvaluationSampler(batches, group.rank, passes, equal=plain, fit_in_a_batch=fit_in_a_batch)
        own = replace_batch_sampler(loader, _IndexBatchSamplerWrapper(sampler) if predicts else sampler)
        return count_samples(own, self._job.evaluation.load)


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

    def scope(self, reader: EvaluationSampler | EvaluatedWhole) -> Scope:
        loop = self._loop()
        combined = loop._combined_loader
        if combined is None:
            return Scope()
        numbers = [n for n, loader in enumerate(combined.flattened) if any(one is reader for one in _readers(loader))]
        if not numbers:
            return Scope()
        side_by_side = combined._mode != "sequential"
        limit = loop.max_batches[numbers[0]]
        steps = int(limit) if limit != float("inf") else None
        return Scope(0 if side_by_side else numbers[0], steps, side_by_side)

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


def _readers(loader: object) -> tuple[object, ...]:
    """What may read the samples of a loader that Lightning has: itself, or its batch sampler, which may be wrapped."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return loader, batch_sampler, getattr(batch_sampler, "_batch_sampler", None)
