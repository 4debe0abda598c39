"""Prepares the loaders of a Trainer: the user's loader stays what it is, only its batch sampler becomes ours.

Lightning injects its own sampler before a strategy is asked, and loaders may be built as early as the user's
`setup`. So the hook that prepares a loader is replaced on the one Trainer that the strategy works for.
"""

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, IterableDataset

from lightning_hetero.trainer.evaluation_loaders import EvaluationLoaders
from lightning_hetero.trainer.training_loaders import TrainingLoaders
from lightning_hetero.trainer.user_loader import (
    is_distributed,
    lost_geographic_sampler,
    name_of,
    replace_batch_sampler,
    users_loader,
)


class TrainerDataLoaders:
    """Prepares all loaders of one call of a Trainer; those of training and evaluation in their own ways."""

    def __init__(self, trainer: "pl.Trainer", training: TrainingLoaders, evaluation: EvaluationLoaders) -> None:
        self._trainer, self._training, self._evaluation = trainer, training, evaluation
        self._lightnings_prepare = trainer._data_connector._prepare_dataloader  # noqa: SLF001 - guarded by a test

    def prepare(self, dataloader: object, shuffle: bool, mode: RunningStage) -> object:
        """What Lightning calls for every loader, on all ranks alike.

        Raises:
            ValueError: it can't be split, in one sentence.
        """
        loader = users_loader(dataloader)
        if isinstance(loader, DataLoader):
            self._require_geographic_sampler(loader)
        if mode == RunningStage.TRAINING:
            return self._training.prepare(loader)
        return self._prepare_evaluation(loader, shuffle, mode) if isinstance(loader, DataLoader) else loader

    def _prepare_evaluation(self, loader: DataLoader[Any], shuffle: bool, mode: RunningStage) -> object:
        if self._training.user_shards or is_distributed(loader):
            if mode == RunningStage.PREDICTING and loader.batch_sampler is not None:
                return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(cast("Any", loader.batch_sampler)))
            return loader
        if isinstance(loader.dataset, IterableDataset):
            return self._lightnings_prepare(loader, shuffle, mode)
        if loader.batch_sampler is None:
            return self._lightnings_prepare(loader, False, mode)
        return self._evaluation.prepare(loader, mode)

    def _require_geographic_sampler(self, loader: DataLoader[Any]) -> None:
        overfits: float = vars(self._trainer)["overfit_batches"]  # Lightning sets it without declaring it
        if overfits and lost_geographic_sampler(loader):
            raise ValueError(
                "overfit_batches replaces the geographic sampler by plain numbers, which "
                f"{name_of(loader.dataset)} can't be indexed with: use limit_train_batches instead"
            )
