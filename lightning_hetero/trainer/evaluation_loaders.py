"""Prepares the loaders of validation, test and prediction: each rank evaluates a part of the loader's own batches."""
# ruff: noqa: SLF001 - what is read of a Trainer's loops is guarded by tests

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops import _EvaluationLoop, _PredictionLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.utils.data import DataLoader

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.eval_sampler import EvaluationSampler, Scope
from lightning_hetero.sampling.global_batches import Grouping
from lightning_hetero.trainer.evaluation import EvaluationBalancer
from lightning_hetero.trainer.loader_agreement import agreed_batches, require_same_loader
from lightning_hetero.trainer.training_loaders import epoch_of
from lightning_hetero.trainer.user_loader import has_plain_batches, replace_batch_sampler


@dataclass(frozen=True)
class EvaluationLoaders:
    """Prepares the evaluation loaders of one call of a Trainer.

    Args:
        trainer: whose.
        group: of all ranks.
        seed: of all passes over samplers, shared by all ranks.
        balancer: knows how long batches take.
    """

    trainer: "pl.Trainer"
    group: RankGroup
    seed: int
    balancer: EvaluationBalancer

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
        sampler = EvaluationSampler(batches, self.group.rank, _StagePasses(self.trainer, stage, self.balancer))
        return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(sampler) if predicts else sampler)


@dataclass(frozen=True)
class _StagePasses:
    """The passes of one stage's evaluations; see `EvaluationPasses`."""

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
