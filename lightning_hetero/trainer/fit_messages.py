"""What ranks tell each other in a training, and what each of them does about it: plans, reports, and stopping."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.exchange.duplicate_data import DuplicateDataCheck
from lightning_hetero.exchange.messages import PendingMessages, StepMessage, StepMessages
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.step.batch_contents import input_shape, shape_number
from lightning_hetero.step.compute_times import ComputeTimes
from lightning_hetero.step.memory_use import MemoryUse
from lightning_hetero.trainer.profiles import run_folder
from lightning_hetero.trainer.reporting import make_reporter
from lightning_hetero.trainer.run import Run


class FitMessages:
    """Sends this rank's messages of a fit, and acts on those of all ranks, in the same way on each of them.

    Args:
        run: the call of the Trainer.
        times: of this rank's steps.
        memory: that this rank uses.

    Attributes:
        planner: decides the plans, from what all ranks have measured.
        reporter: of the run.
    """

    def __init__(self, run: Run, times: ComputeTimes, memory: MemoryUse) -> None:
        job = run.job
        self._run, self._job = run, job
        self._times, self._memory = times, memory
        self._logged = run.metrics.training_results
        self._duplicates = DuplicateDataCheck()
        self._folder = run_folder(run.trainer)
        self.planner = job.planner_cache.current
        if isinstance(self.planner, SplitPlanner):
            self.planner.forget_memory()
        self.reporter = make_reporter(run.trainer, self.planner, job.devices, self._folder)
        self._input_shape = ""  # of the first batch
        self._profile = job.planner_cache.profile  # None once its input shape was compared with this run's
        self._content_hash = 0.0

    def load(self, batch: Any) -> None:
        """A batch has been fetched."""
        self._input_shape = self._input_shape or input_shape(batch)
        self._content_hash = self._run.loaders.content_hash(batch)

    def start(self, kind: int, step: int, **more: Any) -> PendingMessages:
        """Send this rank's message of a step, with what it has measured and logged since the last one.

        Args:
            kind: of the message.
            step: the global batch.
            **more: fields of `StepMessage`.
        """
        measurement = self._times.next_measurement()
        measured = asdict(measurement) if measurement is not None else {}
        message = StepMessage(
            kind=kind,
            step=step,
            last_drawn=self._run.loaders.last_drawn,
            stop_requested=self._run.stop.requested,
            should_stop=self._run.early_stop.wanted,
            input_shape=shape_number(self._input_shape),
            content_hash=self._content_hash,
            **measured,
            **asdict(self._memory.report),
            **more,
        )
        logged = self._logged.message() if self._job.group.world_size > 1 else []
        return PendingMessages(self._job.group, message, logged)

    def update(self, messages: StepMessages) -> None:
        """Act on the messages of a step."""
        self._content_hash = 0.0  # compared once
        self._logged.receive(messages.logged)
        self._memory.update(messages.column("local_batch"))
        self.stop_if_requested(messages)
        self._duplicates.check(messages, self._run.trainer.num_training_batches)
        if self._job.planner_cache.current is not self.planner:  # the training data was set up anew, and differs
            self.planner, self._profile = self._job.planner_cache.current, self._job.planner_cache.profile
            self.reporter = make_reporter(self._run.trainer, self.planner, self._job.devices, self._folder)
        self._compare_with_profile(messages)
        update = self.planner.update(messages.reports())
        for warning in update.warnings:
            rank_zero_warn(warning)
        self.reporter.update(update)

    def stop_if_requested(self, messages: StepMessages) -> None:
        """Stop on all ranks if any was asked to."""
        if messages.column("stop_requested").any():
            self._run.stop.stop()
        if messages.column("should_stop").any():
            self._run.early_stop.share(True)

    def _compare_with_profile(self, messages: StepMessages) -> None:
        """Discard a profile of samples of another shape than rank 0's first batch has; the same on all ranks."""
        if self._profile is None or not self._input_shape or not isinstance(self.planner, SplitPlanner):
            return
        profile, self._profile = self._profile, None
        if self.planner.has_profile and int(messages.column("input_shape")[0]) != shape_number(profile.input_shape):
            self.planner.discard_profile()
            rank_zero_warn(
                f"the profile {profile.path} is of samples of another shape ({profile.input_shape}; here "
                f"{self._input_shape}), so the shares are measured anew"
            )

    def end(self) -> None:
        """Training is over: report what was gained, and save what was measured for the next run."""
        self.reporter.end_run()
        if isinstance(self.planner, SplitPlanner):
            facts, state = self._job.planner_cache.facts, self.planner.state_dict()
            self._job.profiles.save(self._folder, facts, state, self._input_shape)
