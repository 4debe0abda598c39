"""One call of `fit`, `validate`, `test` or `predict`: what is attached to the Trainer, and detached at the end."""
# ruff: noqa: SLF001 - `tests/test_private_names.py` guards what is changed in a loop

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.device.speed_test import speed
from lightning_hetero.exchange import consistency
from lightning_hetero.exchange.messages import ASKS_TO_LOG, all_ask
from lightning_hetero.exchange.store import new_run
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.step.batch_norm import smallest_local_batch
from lightning_hetero.step.collating import NO_SAMPLES
from lightning_hetero.step.out_of_memory import explained
from lightning_hetero.trainer.dataloaders import TrainerDataLoaders
from lightning_hetero.trainer.early_stop import EarlyStop
from lightning_hetero.trainer.hooks import HookCallback, TrainingHooks
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.log_dir import BroadcastCache
from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer
from lightning_hetero.trainer.patches import patch_trainer
from lightning_hetero.trainer.profiles import Profile, run_folder
from lightning_hetero.trainer.signals import StopRequest
from lightning_hetero.trainer.training_loaders import TrainingLoaders


class Run:
    """A call of the Trainer, from the setup of the environment to its teardown.

    Args:
        job: of this process.
        trainer: the one that is called.
        hooks: called before the user's callbacks.

    Attributes:
        number: of this run, the same on all ranks.
        early_stop: shares `trainer.should_stop`.
        stop: handles SIGTERM.
        log_dirs: the broadcast values of `Trainer.log_dir`, for hooks of evaluation batches.
        loaders: the training loaders.
        metrics: synchronizes logged values.
    """

    def __init__(self, job: Job, trainer: "pl.Trainer", hooks: TrainingHooks) -> None:
        self.job = job
        self.trainer = trainer
        seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed()) % 2**32
        seed, self.number = job.group.broadcast((seed, new_run()))
        job.group.waits.begin_run(self.number)
        self.early_stop = EarlyStop(trainer, job.group, job.batches.next_step)
        self.stop = StopRequest(trainer)
        self.log_dirs = BroadcastCache()
        self.loaders = TrainingLoaders(trainer, job, seed, self.planner_for)
        loaders = TrainerDataLoaders(trainer, job, self.loaders, seed)
        self.metrics = MetricSynchronizer(
            trainer,
            job.group,
            job.timer,
            job.device,
            loss_count=job.options.loss_count,
            all_have_new_keys=lambda: all_ask(job.group, ASKS_TO_LOG, job.batches.next_step()),
        )
        self._local_batch: int | None = None  # of an evaluation; 0 if its samples are borrowed
        self._patches = patch_trainer(
            trainer,
            self.metrics,
            self.early_stop,
            prepare_dataloader=loaders.prepare,
            before_batch=hooks.before_batch,
            on_sigterm=self.stop.handle,
            borrows=lambda: self._local_batch == 0,
            callbacks=[
                HookCallback(
                    hooks,
                    self.end_training,
                    self.begin_evaluation,
                    self.begin_evaluation_batch,
                    self.end_prediction,
                    self.end_evaluation,
                )
            ],
        )

    def end(self) -> None:
        """Leave the Trainer as it was."""
        self._patches.close()
        if not self.trainer.interrupted:
            self.job.group.waits.end_run()

    def planner_for(self, global_batch: int, first: bool) -> SplitPlanner:
        """The planner for a training loader's global batch; all ranks call this together.

        Args:
            global_batch: samples.
            first: whether it is for the first training loader, or the only one.
        """
        job, options, module = self.job, self.job.options, self.trainer.lightning_module
        minimum = smallest_local_batch(module, synchronized=job.batch_norm_group is not None)
        facts = consistency.job_facts(module, self.trainer.precision)
        facts |= {"global batch": global_batch, "minimum": minimum}

        def make() -> tuple[SplitPlanner, Profile | None]:
            profile = job.profiles.load(options.shares, run_folder(self.trainer), facts)
            split = partial(
                SplitPlanner,
                options.shares,
                job.group.world_size,
                global_batch,
                minimum=minimum,
                granularity=options.granularity,
                memory=job.memory,
            )
            if profile is not None:
                try:
                    return split(profile=profile.state), profile
                except (ValueError, KeyError, TypeError) as error:  # the same on all ranks
                    rank_zero_warn(f"the profile {profile.path} is ignored: {error}")
            tests_speed = options.shares.adaptive and job.on_cpus and job.group.world_size > 1
            return split(speeds=job.group.gather(speed()) if tests_speed else None), None

        return job.planner_cache.get(facts, make, first=first)

    def begin_evaluation(self) -> None:
        """An evaluation begins, on all ranks together."""
        if self.job.group.world_size > 1:
            with self.log_dirs.recording():
                _ = self.trainer.log_dir  # a broadcast, whose result the strategy keeps

    def begin_evaluation_batch(self) -> None:
        """A batch of an evaluation begins, and its hooks follow."""
        self._local_batch = self.job.evaluation.begin_batch()
        self.metrics.begin_evaluation_batch(self._local_batch)

    def evaluate(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's step in an evaluation; not for a batch of which nothing is left, if there is no other.

        Raises:
            RankOutOfMemoryError: memory has run out.
        """
        reason = "the batches of a fast rank are larger than the batch_size of an evaluation loader"
        with explained(self.job.place, self._local_batch, reason, "choose a smaller batch_size for it"):
            output = step(*args, **kwargs) if not (args and args[0] is NO_SAMPLES) else None
        self.job.evaluation.end_batch()
        return output

    def end_prediction(self) -> None:
        """This rank has no more batches to predict: leave out those that it has borrowed."""
        loop = self.trainer.predict_loop
        for number, borrowed in enumerate(self.job.evaluation.borrowed_batches()):
            for kept in (loop._predictions, loop.epoch_batch_indices):
                if number < len(kept):
                    kept[number][:] = [one for batch, one in enumerate(kept[number]) if batch not in borrowed]

    def end_evaluation(self) -> None:
        """An evaluation ends, on all ranks: they exchange how long it took, and whether any was asked to stop.

        Raises:
            SIGTERMException: one was, in a sanity check; Lightning would make a training step before it stops.
        """
        measured = self.job.evaluation.measured()
        typical = not self.trainer.sanity_checking
        reports = self.job.group.gather(
            (measured if typical else {}, self.stop.requested, self.early_stop.wanted), "the end of the evaluation"
        )
        self.job.evaluation.update([times for times, _, _ in reports])
        if any(wanted for _, _, wanted in reports):
            self.early_stop.share(True)
        if any(requested for _, requested, _ in reports):
            self.stop.stop()
            if self.trainer.sanity_checking:
                raise SIGTERMException

    def end_training(self) -> None:
        """The last epoch ends, on all ranks: they exchange whether any was asked to stop since the last message.

        Raises:
            SIGTERMException: one was.
        """
        if any(self.job.group.any_of([self.stop.requested], "the end of training")):
            raise SIGTERMException
