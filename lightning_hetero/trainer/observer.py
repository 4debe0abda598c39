"""Watches a run on its first rank, and shows what a user should know: in the log, the loggers and `plan.jsonl`.

Everything comes from messages that ranks exchange anyway and from the host's clock; nothing here waits for a device or
for another rank.
"""
# ruff: noqa: SLF001 - the pace and the step axis of Lightning's own logging are private

from collections.abc import Sequence
from time import perf_counter

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.efficiency import FARTHEST, SPARED, Job
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import Planner
from lightning_hetero.planning.reports import StepReports
from lightning_hetero.planning.step_statistics import StepStatistics
from lightning_hetero.trainer.reporting import Ending, Outlook, PlanLog, differs, table


class Observer:
    """What the first rank sees and says of one run.

    Args:
        trainer: whose.
        planner: decides the plans.
        devices: W names.
        granularity: local batches are multiples of it.
        folder: the run's.
    """

    SETTLED = 10
    """Steps measured at one split, with no newer plan, until it is said which ranks do not pay."""

    NAMED = 8
    """Ranks that are named at most, of those that do not pay."""

    def __init__(
        self, trainer: "pl.Trainer", planner: Planner, devices: Sequence[str], granularity: int, folder: str
    ) -> None:
        self._trainer = trainer
        self._planner = planner
        self._devices = devices
        self._granularity = granularity
        self._log = PlanLog(folder)
        self._tally = StepStatistics(len(devices))
        self._shown: tuple[int, ...] = ()
        self._looked_out = False
        self._step = -1
        self.planned(planner.schedule.newest)

    def planned(self, plan: Plan) -> None:
        """There is a new plan."""
        self._log.write(plan)
        if not self._shown or differs(plan.local_batches, self._shown):
            self._shown = plan.local_batches
            caps = self._planner.caps
            rank_zero_info(table(plan, self._devices, caps.peaks() if caps is not None else None))

    def begin_batch(self) -> None:
        """A training batch is about to be fetched."""
        self._tally.begin(perf_counter())

    def pause(self) -> None:
        """Something comes that is no training step."""
        self._tally.pause()

    def update(self, planner: Planner, reports: StepReports, plans: Sequence[Plan]) -> None:
        """All ranks have told of their own work.

        Args:
            planner: the one that has heard it too; another one than before where the job has changed.
            reports: theirs.
            plans: what the planner has decided upon them.
        """
        if planner is not self._planner:
            self._planner, self._tally, self._shown = planner, StepStatistics(len(self._devices)), ()
            self.planned(planner.schedule.plans[0])
        self._tally.update(reports.measured_steps.tolist(), reports.compute_seconds.tolist())
        for plan in plans:
            self.planned(plan)

    def end_batch(self, step: int, *, stepped: bool) -> None:
        """A training batch is over.

        Args:
            step: the global batch.
            stepped: the optimizer has made its step.
        """
        self._step = step
        self._tally.end(perf_counter(), step, self._planner.schedule.at(step).local_batches, stepped=stepped)
        if stepped and self._trainer.loggers and self._trainer._logger_connector.should_update_logs:
            self._log_scalars(step)
        if (
            not self._looked_out
            and self._tally.settled >= self.SETTLED
            and self._tally.split == self._planner.schedule.newest.local_batches
        ):
            self._look_out(step)

    def end_run(self) -> None:
        """Training is over: say what was gained."""
        seconds, job, split = self._tally.latest_seconds(), self._job(), self._tally.split
        if seconds is None or len(split) == 1:
            return
        equal = proportional(
            sum(split), [1.0] * len(split), minimum=self._planner.minimum, granularity=self._granularity
        )
        ending = Ending(
            split,
            seconds,
            self._tally.early_seconds() if self._tally.first_split != split else None,
            self._tally.first_split == equal,
            job.gain_over_equal(split) if job is not None else None,
            job.limit(sum(split)) if job is not None else None,
        )
        self._log.add(ending.event(self._step))
        if (sentence := ending.sentence()) is not None:
            rank_zero_info(sentence)

    def _job(self) -> Job | None:
        models = self._planner.models()
        if models is None:
            return None
        caps = self._planner.caps
        return Job(
            models,
            self._planner.tails(),
            self._planner.minimum,
            self._granularity,
            maximum=caps.allowed if caps is not None else None,
            # A GPU copies and communicates beside its own work.
            spared=[
                SPARED * model.seconds(self._planner.global_batch) if device == "cpu" else 0.0
                for model, device in zip(models, self._devices, strict=True)
            ],
        )

    def _log_scalars(self, step: int) -> None:
        plan, pace, job = self._planner.schedule.at(step), self._tally.pace(), self._job()
        size = plan.global_batch
        scalars = {f"hetero/share/rank{rank}": b / size for rank, b in enumerate(plan.local_batches)}
        if pace is not None:
            scalars["hetero/step_seconds"] = pace.seconds
            scalars["hetero/idle_fraction"] = pace.idle
            scalars["hetero/samples_per_second"] = size / pace.seconds
            if job is not None:
                scalars["hetero/fraction_of_limit"] = job.fraction_of_limit(size, pace.seconds)
        for logger in self._trainer.loggers:
            logger.log_metrics(scalars, step=self._trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _look_out(self, step: int) -> None:
        job = self._job()
        self._looked_out = True
        if job is None or job.world_size == 1:
            return
        self.pause()  # what is computed here is no part of a step
        size = self._planner.global_batch
        paying = job.paying(size)
        left_out = sorted(set(range(job.world_size)) - set(paying.ranks), key=job.earliest, reverse=True)
        outlook = Outlook(
            size,
            job.best(size)[1],
            paying.seconds,
            {rank: job.pays_from(rank, size) for rank in left_out[: self.NAMED]},
            FARTHEST * size,
        )
        self._log.add(outlook.event(step))
        if (sentence := outlook.sentence(self._devices)) is not None:
            rank_zero_info(sentence)
