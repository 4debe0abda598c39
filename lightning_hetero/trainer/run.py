"""One call of the Trainer: what is put on it for `fit`, `validate`, `test` or `predict`, and taken off at the end."""

import os
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.device.speed_test import speed
from lightning_hetero.exchange import consistency, failures
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.step.batch_norm import smallest_local_batch
from lightning_hetero.trainer.dataloaders import TrainerDataLoaders
from lightning_hetero.trainer.evaluation import RememberedBroadcasts, batch_hook
from lightning_hetero.trainer.hooks import HookCallback, TrainingHooks
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer
from lightning_hetero.trainer.patches import patch_trainer
from lightning_hetero.trainer.profiles import Profile, run_folder
from lightning_hetero.trainer.signals import StopRequest
from lightning_hetero.trainer.training_loaders import TrainingLoaders


class Run:
    """A call of the Trainer, from the setup of the environment to its teardown.

    Args:
        job: of this process.
        trainer: whose.
        hooks: called before the user's.

    Attributes:
        number: of this run, the same on all ranks.
        profile: what an earlier run has measured, once the planner has begun with it.
        job_facts: what a profile of this run holds for; empty before the training data is set up.
        stop: handles SIGTERM.
        log_dirs: what `Trainer.log_dir` is in an evaluation.
        loaders: of the training.
        metrics: what is logged, on all ranks alike.
    """

    def __init__(self, job: Job, trainer: "pl.Trainer", hooks: TrainingHooks) -> None:
        self.job = job
        self.trainer = trainer
        seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed()) % 2**32
        seed, self.number = job.group.broadcast((seed, failures.new_run()))
        self.profile: Profile | None = None
        self.job_facts: dict[str, Any] = {}
        self.stop = StopRequest(trainer)
        self.log_dirs = RememberedBroadcasts()
        self.loaders = TrainingLoaders(trainer, job, seed, self.planner_for)
        loaders = TrainerDataLoaders(trainer, job, self.loaders, seed)
        self.metrics = MetricSynchronizer(
            trainer,
            job.group,
            job.timer,
            job.device,
            loss_count=job.options.loss_count,
            in_evaluation_batch=self.in_evaluation_batch,
        )
        self._patches = patch_trainer(
            trainer,
            self.metrics,
            prepare_dataloader=loaders.prepare,
            before_batch=hooks.before_batch,
            on_sigterm=self.stop.handle,
            callbacks=[HookCallback(hooks, self.end_training, self.begin_evaluation, self.end_evaluation)],
        )

    def end(self) -> None:
        """Leave the Trainer as it was."""
        self._patches.close()

    def in_evaluation_batch(self) -> bool:
        """Whether this rank is in a hook of an evaluation batch, which other ranks may not have."""
        return batch_hook(self.trainer.lightning_module) is not None

    def planner_for(self, global_batch: int, first: bool) -> SplitPlanner:
        """The planner for a training loader's global batch; all ranks ask together.

        Args:
            global_batch: samples.
            first: it is for the first of the loaders that are trained on together, or the only one.
        """
        job, options, module = self.job, self.job.options, self.trainer.lightning_module
        facts = {**consistency.job_facts(module, self.trainer.precision), "global batch": global_batch}
        minimum = smallest_local_batch(module, synchronized=job.batch_norm_group is not None)

        def make() -> SplitPlanner:
            self.job_facts = facts
            self.profile = job.profiles.load(options.shares, run_folder(self.trainer), facts)
            split = partial(
                SplitPlanner,
                options.shares,
                job.group.world_size,
                global_batch,
                minimum=minimum,
                granularity=options.granularity,
                memory=job.memory,
            )
            if self.profile is not None:
                try:
                    return split(profile=self.profile.state)
                except (ValueError, KeyError, TypeError) as error:  # the same on all ranks
                    rank_zero_warn(f"the profile {self.profile.path} is ignored: {error}")
                    self.profile = None
            measures = options.shares.adaptive and job.on_cpus and job.group.world_size > 1
            return split(speeds=job.group.gather(speed()) if measures else None)

        return job.planners.get({**facts, "minimum": minimum}, make, first=first)

    def begin_evaluation(self) -> None:
        """An evaluation begins, on all ranks together."""
        if self.job.group.world_size > 1:
            with self.log_dirs.recording():
                _ = self.trainer.log_dir  # the strategy remembers what becomes of it

    def end_evaluation(self) -> None:
        """An evaluation is over, on all ranks: they exchange how long it took, and whether one of them is to stop.

        Raises:
            SIGTERMException: one is, after a sanity check; Lightning would make a training step before it stops.
        """
        measured = self.job.evaluation.measured()
        typical = not self.trainer.sanity_checking
        reports = self.job.group.gather((measured if typical else {}, self.stop.requested))
        self.job.evaluation.update([times for times, _ in reports])
        if any(requested for _, requested in reports):
            self.stop.stop()
            if self.trainer.sanity_checking:
                raise SIGTERMException

    def end_training(self) -> None:
        """The last epoch is over, on all ranks: they exchange whether one is to stop since the last message.

        Raises:
            SIGTERMException: one is.
        """
        if any(self.job.group.any_of([self.stop.requested])):
            raise SIGTERMException
