"""Reports a run to its user: in the log, in the Trainer's loggers and in `plan.jsonl`; waits for no device."""
# ruff: noqa: SLF001 - `tests/test_private_names.py` guards what is read of the Trainer

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hetero.planning.allocation import proportional
from lightning_hetero.planning.efficiency import LARGEST_FACTOR, EfficiencyModel
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import Planner, PlanUpdate, SplitPlanner
from lightning_hetero.planning.step_statistics import StepStatistics

SETTLED_STEPS = 10
"""Steps at the newest plan before the ranks that do not pay are reported; while exploring, no plan lasts as long."""

MOST_NAMED = 8
"""The largest number of ranks that do not pay to be named: what fits in one line."""


class SilentReporter:
    """Reports nothing: on all ranks but the first, and where the user shards the data.

    `begin_batch` is called before a training batch is fetched, `pause` before anything that is no training step, and
    `end_batch` after the training step on global batch `step`; `stepped`: the optimizer has made a step, too.
    """

    def begin_batch(self) -> None: ...
    def pause(self) -> None: ...
    def update(self, update: PlanUpdate) -> None: ...
    def end_batch(self, step: int, *, stepped: bool) -> None: ...
    def end_run(self) -> None: ...


class RunReporter(SilentReporter):
    """Reports on the first rank; for the arguments see `make_reporter`."""

    def __init__(self, trainer: pl.Trainer, planner: SplitPlanner, devices: Sequence[str], folder: Path | None) -> None:
        self._trainer, self._planner, self._devices = trainer, planner, devices
        self._path = folder / "hetero" / "plan.jsonl" if folder is not None else None
        self._statistics = StepStatistics()
        self._shown: tuple[int, ...] = ()
        self._reported_paying = False
        self._step = -1
        self._report_plan(planner.schedule.newest)

    def begin_batch(self) -> None:
        self._statistics.begin(perf_counter())

    def pause(self) -> None:
        self._statistics.pause()

    def end_batch(self, step: int, *, stepped: bool) -> None:
        self._step = step
        self._statistics.end(perf_counter(), step, stepped=stepped)
        if stepped and self._trainer.loggers and self._trainer._logger_connector.should_update_logs:
            values = self.scalars()
            for logger in self._trainer.loggers:
                logger.log_metrics(values, step=self._trainer.fit_loop.epoch_loop._batches_that_stepped)
        latest, plan = self._statistics.splits[-1:], self._planner.schedule.newest.local_batches
        settled = latest and latest[0].local_batches == plan and len(latest[0].seconds) >= SETTLED_STEPS
        if settled and not self._reported_paying and (model := self._efficiency()) is not None:
            self._reported_paying = True
            self._report_paying(model)

    def update(self, update: PlanUpdate) -> None:
        self._statistics.update(update.measured)
        for plan in update.plans:
            self._report_plan(plan)

    def end_run(self) -> None:
        if not self._statistics.splits or len(self._devices) == 1:
            return
        first, last, planner = self._statistics.splits[0], self._statistics.splits[-1], self._planner
        split, seconds, size = last.local_batches, median(last.seconds), planner.global_batch
        before = median(first.seconds) if first.local_batches != split else None
        equal = proportional(size, [1.0] * len(split), minimum=planner.least, granularity=planner.granularity)
        model = self._efficiency()
        event = {
            "event": "end",
            "step": self._step,
            "local_batches": split,
            "step_seconds": seconds,
            "samples_per_second": size / seconds,
            "first_local_batches": first.local_batches,
            "first_step_seconds": before,
            "measured_gain": before / seconds if before else None,
            "predicted_gain": model.split_seconds(equal) / model.split_seconds(split) if model else None,
            "fraction_of_limit": size / seconds / model.throughput_limit(size) if model else None,
        }
        self._report(event, end_sentence(event) if model else None)

    def scalars(self) -> dict[str, float]:
        """What is logged after a step; averages are over the steps since the last call."""
        plan, averages, model = self._planner.schedule.at(self._step), self._statistics.averages(), self._efficiency()
        values = {f"hetero/share/rank{rank}": b / plan.global_batch for rank, b in enumerate(plan.local_batches)}
        if averages is not None:
            seconds, idle = averages
            speed = plan.global_batch / seconds
            values |= {"hetero/step_seconds": seconds, "hetero/idle_fraction": idle, "hetero/samples_per_second": speed}
            if model is not None:
                values["hetero/fraction_of_limit"] = speed / model.throughput_limit(plan.global_batch)
        return values

    def _report_plan(self, plan: Plan) -> None:
        event = {
            "event": "plan",
            "step": plan.first_step,
            "local_batches": plan.local_batches,
            "predicted_seconds": plan.predicted_seconds or (),
            "reason": plan.reason,
        }
        table = None
        if not self._shown or differs(plan.local_batches, self._shown):
            caps, self._shown = self._planner.caps, plan.local_batches
            table = plan_table(plan, self._devices, caps.peaks() if caps is not None else None)
        self._report(event, table)

    def _report_paying(self, model: EfficiencyModel) -> None:
        self.pause()  # the time for this belongs to no step
        size, ranks = self._planner.global_batch, range(len(self._devices))
        paying = model.paying(size)
        others = sorted(set(ranks).difference(paying), key=lambda rank: -model.shortest_seconds[rank])[:MOST_NAMED]
        event = {
            "event": "paying",
            "step": self._step,
            "global_batch": size,
            "predicted_seconds": model.step_seconds(size, ranks),
            "predicted_seconds_without": model.step_seconds(size, paying),
            "not_paying": [{"rank": rank, "pays_from": model.pays_from(rank, size)} for rank in others],
        }
        self._report(event, not_paying_sentence(event, self._devices) if others else None)

    def _efficiency(self) -> EfficiencyModel | None:
        planner, models = self._planner, self._planner.models()
        if models is None:
            return None
        maximum = planner.caps.allowed if planner.caps is not None else None
        return EfficiencyModel(models, planner.exposed_communication(), planner.least, planner.granularity, maximum)

    def _report(self, event: Mapping[str, Any], text: str | None) -> None:
        """Add a line to `plan.jsonl`, and log a text; a folder that can't be written to does not end the run."""
        if text is not None:
            rank_zero_info(text)
        try:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event) + "\n")
        except OSError as error:
            rank_zero_warn(f"the plans of this run are not written down: {error}")
            self._path = None


def make_reporter(trainer: pl.Trainer, planner: Planner, devices: Sequence[str], folder: Path | None) -> SilentReporter:
    """This rank's reporter; `devices`: W names, `folder`: of `hetero/plan.jsonl`, None where nothing is written."""
    if trainer.is_global_zero and isinstance(planner, SplitPlanner):
        return RunReporter(trainer, planner, devices, folder)
    return SilentReporter()


def plan_table(plan: Plan, devices: Sequence[str], peaks: Sequence[float] | None = None) -> str:
    """A plan as a table, one row per rank; `peaks`: the most bytes that each of W ranks has held, 0 where unknown."""
    rows = [("rank", "device", "samples/s", "share", "predicted", "memory")]
    for rank, (device, local_batch) in enumerate(zip(devices, plan.local_batches, strict=True)):
        seconds = plan.predicted_seconds[rank] if plan.predicted_seconds else None
        speed, predicted = (f"{local_batch / seconds:.1f}", f"{seconds * 1000:.0f} ms") if seconds else ("-", "-")
        memory = f"{peaks[rank] / 2**30:.2f} GiB" if peaks and peaks[rank] > 0 else "-"
        share = f"{local_batch} ({local_batch / plan.global_batch:.0%})"
        rows.append((str(rank), device, speed, share, predicted, memory))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    head = f"hetero: global batch {plan.global_batch} from step {plan.first_step} on ({plan.reason})"
    return "\n".join([head, *lines])


def differs(split: Sequence[int], shown: Sequence[int]) -> bool:
    """Whether a local batch has moved by more than noise: one sample, or 2% of the global batch if that is more."""
    return max(abs(a - b) for a, b in zip(split, shown, strict=True)) > max(1.0, 0.02 * sum(split))


def duration(seconds: float) -> str:
    """Seconds to three significant digits, so that times that differ by 2% look different."""
    if seconds < 0.1:
        return f"{1000 * seconds:#.3g}".rstrip(".") + " ms"
    return f"{seconds:#.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def not_paying_sentence(event: Mapping[str, Any], devices: Sequence[str]) -> str:
    """The sentence of the event `paying`: which devices do not pay, and from which global batch on they would."""
    size, others = event["global_batch"], [(entry["rank"], entry["pays_from"]) for entry in event["not_paying"]]
    names = " and ".join(f"rank {rank} ({devices[rank]})" for rank, _ in others)
    verb, them = ("does", "it") if len(others) == 1 else ("do", "them")
    never = f"not at any up to {LARGEST_FACTOR * size}"
    # A prediction: two significant digits are enough.
    froms = [f"from about {float(f'{first:.2g}'):.0f} on" if first else never for _, first in others]
    when = ", ".join(f"rank {rank} would {text}" for (rank, _), text in zip(others, froms, strict=True))
    seconds, without = duration(event["predicted_seconds"]), duration(event["predicted_seconds_without"])
    cost = f"without {them} a step would take {without} instead of {seconds}"
    return f"hetero: {names} {verb} not pay at a global batch of {size}: {cost}; {when}"


def end_sentence(event: Mapping[str, Any]) -> str:
    """The sentence of the event `end`: what the run has gained."""
    gain = f"{event['predicted_gain']:.2f} times as fast as an equal split by the models"
    if before := event["first_step_seconds"]:
        gain += f", {event['measured_gain']:.2f} times as fast as at its first split ({duration(before)}) as measured"
    speed, part = event["samples_per_second"], event["fraction_of_limit"]
    total = f"{speed:.4g} samples/s are {part:.0%} of the {speed / part:.4g} that all devices reach one by one"
    return f"hetero: a step took {duration(event['step_seconds'])}, {gain}; {total}"
