"""What a user sees of a run: tables, scalars, who does not pay, and what was gained."""

import csv
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lightning_hetero.trainer.reporting
from lightning_hetero import HeteroStrategy
from lightning_hetero.planning.plan import Plan, Schedule
from lightning_hetero.planning.planner import PlanUpdate, SplitPlanner, UserSharded
from lightning_hetero.planning.reports import MeasuredStep
from lightning_hetero.planning.shares import Shares
from lightning_hetero.planning.step_time import StepTimeModel
from lightning_hetero.trainer.reporting import (
    SETTLED_STEPS,
    RunReporter,
    SilentReporter,
    differs,
    duration,
    end_sentence,
    make_reporter,
    not_paying_sentence,
    plan_table,
)
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer


def test_a_table_shows_what_is_known():
    text = plan_table(Plan(7, (48, 16), (0.5, 0.4), "balance"), ["cpu", "NVIDIA X"], [2.0**30, 2.0**31])
    lines = text.splitlines()
    assert lines[0] == "hetero: global batch 64 from step 7 on (balance)"
    assert lines[2].split() == ["0", "cpu", "96.0", "48", "(75%)", "500", "ms", "1.00", "GiB"]
    assert lines[3].split() == ["1", "NVIDIA", "X", "40.0", "16", "(25%)", "400", "ms", "2.00", "GiB"]


@pytest.mark.parametrize(
    ("split", "shown", "worth"),
    [
        ((8, 8), (8, 8), False),
        ((9, 7), (8, 8), False),
        ((10, 6), (8, 8), True),
        ((502, 498), (500, 500), False),
        ((520, 480), (500, 500), False),
        ((521, 479), (500, 500), True),
        ((9, 9, 6), (8, 8, 8), True),
    ],
)
def test_a_table_is_shown_for_more_than_noise(split, shown, worth):
    """One sample, or 2% of the global batch."""
    assert differs(split, shown) is worth
    assert differs(shown, split) is worth


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.40123, "0.401 s"),
        (0.1, "0.100 s"),
        (1.5, "1.50 s"),
        (0.0431, "43.1 ms"),
        (0.00012, "0.120 ms"),
        (120, "120 s"),
    ],
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text


class Messages(logging.Handler):
    """What is logged on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.INFO)

    def close(self) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).removeHandler(self)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


DEVICES = ["cpu", "cpu", "NVIDIA X"]


@pytest.mark.parametrize(
    ("pays_from", "who", "them", "when"),
    [
        ({1: 87}, "rank 1 (cpu) does", "it", "rank 1 would from about 87 on"),
        ({1: None}, "rank 1 (cpu) does", "it", "rank 1 would not at any up to 4096"),
        (
            {2: None, 1: 1234},
            "rank 2 (NVIDIA X) and rank 1 (cpu) do",
            "them",
            "rank 2 would not at any up to 4096, rank 1 would from about 1200 on",
        ),
    ],
)
def test_ranks_that_do_not_pay_are_reported_in_one_sentence(pays_from, who, them, when):
    event = {
        "global_batch": 64,
        "predicted_seconds": 0.4312,
        "predicted_seconds_without": 0.4,
        "not_paying": [{"rank": rank, "pays_from": first} for rank, first in pays_from.items()],
    }
    assert not_paying_sentence(event, DEVICES) == (
        f"hetero: {who} not pay at a global batch of 64: without {them} a step would take 0.400 s instead of 0.431 s; "
        f"{when}"
    )


def test_the_end_is_said_in_one_sentence():
    event = {"step_seconds": 0.4, "predicted_gain": 2.2, "samples_per_second": 160.0, "fraction_of_limit": 0.8}
    moved = event | {"first_step_seconds": 0.8, "measured_gain": 2.0}
    assert end_sentence(moved) == (
        "hetero: a step took 0.400 s, 2.20 times as fast as an equal split by the models, 2.00 times as fast as at its "
        "first split (0.800 s) as measured; 160 samples/s are 80% of the 200 that all devices reach one by one"
    )
    assert "measured" not in end_sentence(event | {"first_step_seconds": None, "measured_gain": None})


class StandInPlanner:
    """Two ranks; rank 1 takes `fixed` seconds for a step, however small, and rank 0 takes 1 s for the whole batch."""

    def __init__(self, fixed: float, maximum: int | None = None, *, fitted: bool = True) -> None:
        self.least, self.granularity, self.global_batch = 1, 1, 64
        self.schedule = Schedule(Plan(0, (32, 32)))
        self.caps = None if maximum is None else SimpleNamespace(allowed=(maximum, 64), peaks=lambda: [2.0**30, 0.0])
        self._models = (StepTimeModel((0,), (0.0,), 1 / 64), StepTimeModel((0,), (fixed,), 0.02)) if fitted else None

    def models(self) -> Any:
        return self._models

    def exposed_communication(self) -> tuple[float, ...]:
        return (0.0, 0.0)


@pytest.fixture
def said() -> Iterator[list[str]]:
    messages = Messages()
    yield messages.said
    messages.close()


class TestRunReporter:
    """Without a Trainer: what a planner decides and ranks measure goes in, lines and sentences come out."""

    def reported(self, planner: Any, folder: Path | None, splits: list[tuple[int, int]]) -> list[dict[str, Any]]:
        reporter = RunReporter(SimpleNamespace(loggers=[]), planner, DEVICES[:2], folder)
        for step, split in enumerate(splits):
            reporter.begin_batch()
            if split != planner.schedule.at(step).local_batches:
                plan = Plan(step, split, (1.0, 0.5), "balance")
                planner.schedule.append(plan)
                reporter.update(PlanUpdate((plan,)))
            reporter.end_batch(step, stepped=True)
            reporter.update(PlanUpdate(measured=(MeasuredStep(step, split, (1.0, 0.5), (0.0, 0.0), False),)))
        reporter.end_run()
        path = folder / "hetero" / "plan.jsonl" if folder is not None else None
        return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []

    @pytest.mark.parametrize(("fixed", "maximum", "pays"), [(1.1, None, False), (1.1, 63, True), (0.5, None, True)])
    def test_who_does_not_pay_follows_from_models_and_memory(self, tmp_path, said, fixed, maximum, pays):
        """Rank 0 alone would take 1 s, if its memory holds the whole global batch."""
        events = self.reported(StandInPlanner(fixed, maximum), tmp_path, [(32, 32)] * 20)
        (event,) = [event for event in events if event["event"] == "paying"]
        assert [entry["rank"] for entry in event["not_paying"]] == ([] if pays else [1])
        assert sum("does not pay" in text for text in said) == (not pays)
        assert event["step"] == SETTLED_STEPS + 1, (
            "the first step is no measurement, and the last is known with the next"
        )

    def test_nothing_is_said_of_ranks_before_the_newest_plan_is_measured(self, tmp_path, said):
        splits = [(32, 32)] * SETTLED_STEPS + [(40, 24)] * SETTLED_STEPS
        assert [event["event"] for event in self.reported(StandInPlanner(1.1), tmp_path, splits)] == ["plan"] * 2 + [
            "end"
        ]

    def test_each_plan_is_a_line_and_a_table_if_it_matters(self, tmp_path, said):
        events = self.reported(StandInPlanner(0.1, 63), tmp_path, [(32, 32), (33, 31), (40, 24), (41, 23)])
        assert [(event["step"], event["local_batches"]) for event in events if event["event"] == "plan"] == [
            (0, [32, 32]),
            (1, [33, 31]),
            (2, [40, 24]),
            (3, [41, 23]),
        ]
        tables = [text for text in said if "from step" in text]
        assert [text.splitlines()[0] for text in tables] == [
            "hetero: global batch 64 from step 0 on (equal)",
            "hetero: global batch 64 from step 2 on (balance)",
        ]
        assert "1.00 GiB" in tables[0]

    @pytest.mark.parametrize("fitted", [True, False])
    def test_the_end_compares_with_the_first_split(self, tmp_path, said, fitted):
        """Predicted gains need models, which fixed shares have not."""
        *_, end = self.reported(StandInPlanner(0.1, fitted=fitted), tmp_path, [(32, 32)] * 5 + [(56, 8)] * 5)
        assert (end["event"], end["step"]) == ("end", 9)
        assert (end["first_local_batches"], end["local_batches"]) == ([32, 32], [56, 8])
        assert end["measured_gain"] == end["first_step_seconds"] / end["step_seconds"]
        assert end["samples_per_second"] == pytest.approx(64 / end["step_seconds"])
        assert end["predicted_gain"] == (pytest.approx(0.74 / 0.875) if fitted else None)
        assert (end["fraction_of_limit"] is not None) is fitted
        assert sum("a step took" in text for text in said) == fitted

    def test_a_run_at_its_first_split_has_gained_nothing(self, tmp_path, said):
        *_, end = self.reported(StandInPlanner(0.1), tmp_path, [(32, 32)] * 5)
        assert (end["first_step_seconds"], end["measured_gain"]) == (None, None)

    def test_without_a_folder_there_are_only_log_messages(self, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.reported(StandInPlanner(0.1), None, [(32, 32)] * 5) == []
        assert len(said) == 2
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_can_not_be_written_to_is_one_warning(self, tmp_path, said):
        """Training is worth more than the list of its plans."""
        (tmp_path / "hetero").write_text("a file stands where the folder should be")
        with pytest.warns(UserWarning, match="the plans of this run are not written down") as caught:
            self.reported(StandInPlanner(0.1), tmp_path, [(32, 32), (40, 24)])
        assert len(caught) == 1


def test_only_the_first_rank_reports_and_only_where_there_are_plans(tmp_path, said):
    planner = SplitPlanner(Shares.parse("equal"), 2, 8)
    first = make_reporter(SimpleNamespace(is_global_zero=True, loggers=[]), planner, DEVICES[:2], tmp_path)
    assert isinstance(first, RunReporter)
    for is_first, plans in ((False, planner), (True, UserSharded())):
        silent = make_reporter(SimpleNamespace(is_global_zero=is_first, loggers=[]), plans, DEVICES[:2], tmp_path)
        assert type(silent) is SilentReporter
        silent.begin_batch()
        silent.update(PlanUpdate((Plan(0, (4, 4)),)))
        silent.end_batch(0, stepped=True)
        silent.pause()
        silent.end_run()
    assert len(said) == 1, "the first rank's table"


# ---- real fits ----


def work(times: int) -> None:
    for _ in range(times):
        torch.linalg.matrix_exp(torch.ones(40, 40) / 100)


class Fixed(Regression):
    """Rank 1 has a fixed cost of 150 samples of rank 0; what is logged is logged by Lightning."""

    costs = (0, 150)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        work(self.costs[self.global_rank] + len(batch["x"]))
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Slow(Fixed):
    """Rank 1 is slow, but pays."""

    costs = (0, 0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        work(10 * len(batch["x"]) if self.global_rank == 1 else 0)
        return super().training_step(batch, batch_idx)


class SlowStart(Slow):
    """Rank 1 is clearly slower in the first step, whatever else that one takes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        work(20_000 if self.global_rank == 1 and batch_idx == 0 else 0)
        return super().training_step(batch, batch_idx)


class Remembers(CSVLogger):
    """A logger that remembers what it was given, on any rank."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="run")
        self.given: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.given.append((step, metrics))
        super().log_metrics(metrics, step)


class InForce(Callback):
    """The split of each step."""

    def __init__(self) -> None:
        self.splits: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.splits.append(list(trainer.strategy.plan.local_batches))


def observed(folder: str, module: Any, global_batch: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    messages, logger = Messages(), Remembers(folder)
    strategy = HeteroStrategy(global_batch=global_batch, **options.pop("strategy", {}))
    in_force = InForce()
    settings = {"max_epochs": 1, "logger": logger, "log_every_n_steps": 5, "callbacks": [in_force]}
    trainer = make_trainer(strategy, 2, **(settings | options))
    trainer.fit(module(), DataLoader(Numbers(global_batch * steps), batch_size=global_batch // 2))
    path = Path(trainer.log_dir or trainer.default_root_dir) / "hetero" / "plan.jsonl"
    metrics = Path(logger.log_dir) / "metrics.csv"
    return {
        "said": [text for text in messages.said if text.startswith("hetero")],
        "given": logger.given,
        "events": [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [],
        "rows": list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else [],
        "splits": in_force.splits,
    }


def test_a_rank_that_does_not_pay_is_named_once(tmp_path):
    first, second = run_ranks(2, observed, str(tmp_path), Fixed, 16, 60, {})
    sentences = [text for text in first["said"] if "does not pay" in text]
    assert len(sentences) == 1, first["said"]
    assert sentences[0].startswith("hetero: rank 1 (cpu) does not pay at a global batch of 16: without it a step would")
    (event,) = [event for event in first["events"] if event["event"] == "paying"]
    assert event["global_batch"] == 16
    assert event["predicted_seconds"] > 1.02 * event["predicted_seconds_without"]
    (entry,) = event["not_paying"]
    assert entry["rank"] == 1
    if entry["pays_from"] is None:  # where other load slowed the rank down while it was measured
        assert sentences[0].endswith("rank 1 would not at any up to 1024")
    else:
        assert 16 < entry["pays_from"] <= 64 * 16
        assert "rank 1 would from about " in sentences[0]
    assert second["said"] == []


def test_the_end_says_what_was_gained(tmp_path):
    first, _ = run_ranks(2, observed, str(tmp_path), Slow, 32, 40, {})
    # Whether a rank pays in steps of a few milliseconds depends on the machine; if it is in the file, it is logged too.
    (paying,) = [event for event in first["events"] if event["event"] == "paying"]
    assert len(paying["not_paying"]) == sum("does not pay" in text for text in first["said"])
    end = first["events"][-1]
    assert end["event"] == "end"
    assert end["step"] == 39
    assert end["local_batches"] in first["splits"]
    assert end["predicted_gain"] > 1
    assert end["first_local_batches"] in first["splits"][:4]
    before = end["first_step_seconds"]
    assert end["measured_gain"] == (before / end["step_seconds"] if before else None)
    assert end["samples_per_second"] == pytest.approx(32 / end["step_seconds"])
    assert end["fraction_of_limit"] > 0
    assert "times as fast as an equal split by the models" in first["said"][-1]
    assert ("as measured" in first["said"][-1]) == (end["first_step_seconds"] is not None)


def test_what_a_step_took_is_known_before_the_next_batch_is_drawn(tmp_path):
    first, _ = run_ranks(2, observed, str(tmp_path), SlowStart, 32, 4, {})
    plans = [event for event in first["events"] if event["event"] == "plan"]
    assert [plan["step"] for plan in plans[:2]] == [0, 1]
    assert plans[1]["local_batches"][1] < plans[0]["local_batches"][1]


def test_tables_are_shown_for_plans_that_matter(tmp_path):
    """Every plan is a line of plan.jsonl; a table is shown where shares moved by more than one sample of 32."""
    first, _ = run_ranks(2, observed, str(tmp_path), Slow, 32, 40, {})
    plans = [event for event in first["events"] if event["event"] == "plan"]
    written = {plan["step"]: plan["local_batches"] for plan in plans}
    for step, split in enumerate(first["splits"]):
        assert split == written[max(begun for begun in written if begun <= step)]
    tables = [text for text in first["said"] if text.startswith("hetero: global batch 32 from step ")]
    shown, expected = (0, 0), 0
    for plan in plans:
        if abs(plan["local_batches"][0] - shown[0]) > 1:
            shown, expected = plan["local_batches"], expected + 1
    assert len(tables) == expected >= 2


def test_fixed_shares_report_what_was_measured_only(tmp_path):
    first, _ = run_ranks(2, observed, str(tmp_path), Slow, 16, 20, {"strategy": {"shares": [3, 1]}})
    assert [event["event"] for event in first["events"]] == ["plan", "end"]
    end = first["events"][-1]
    assert end["local_batches"] == [12, 4]
    assert end["step_seconds"] > 0
    assert [end[name] for name in ("predicted_gain", "measured_gain", "fraction_of_limit")] == [None] * 3
    assert len(first["said"]) == 1, "the table"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scalars_are_logged_as_lightning_logs(tmp_path, accumulate):
    """On the first rank, at the steps at which Lightning logs, under the same step numbers."""
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2, "log_every_n_steps": 4}
    first, second = run_ranks(2, observed, str(tmp_path), Slow, 16, 18, options)
    ours = {step: scalars for step, scalars in first["given"] if "hetero/share/rank0" in scalars}
    steps = [step for step, scalars in first["given"] if "loss" in scalars]
    assert list(ours) == steps
    assert steps == list(range(3, 36 // accumulate, 4))
    assert not [scalars for _, scalars in second["given"] if any(name.startswith("hetero") for name in scalars)]
    for scalars in ours.values():
        assert scalars["hetero/share/rank0"] + scalars["hetero/share/rank1"] == pytest.approx(1)
        assert all(math.isfinite(value) for value in scalars.values())
    full = [scalars for scalars in ours.values() if "hetero/step_seconds" in scalars]
    assert len(full) >= len(ours) - 1
    for scalars in full:
        assert 0 <= scalars["hetero/idle_fraction"] < 1
        assert scalars["hetero/samples_per_second"] == pytest.approx(16 / scalars["hetero/step_seconds"])
    assert any(scalars.get("hetero/fraction_of_limit", 0) > 0 for scalars in full)
    written = [row for row in first["rows"] if row.get("hetero/share/rank0")]
    assert [int(row["step"]) for row in written] == steps


def refuse(*_: Any) -> None:
    raise AssertionError("nothing is to be logged")


def silent(folder: str) -> Any:
    RunReporter.scalars = refuse
    return observed(folder, Slow, 16, 10, {"logger": False})


def test_without_a_logger_nothing_is_computed_for_one(tmp_path):
    first, _ = run_ranks(2, silent, str(tmp_path))
    assert first["rows"] == []
    assert first["said"]


def timed(folder: str) -> Any:
    """The reporter's clock advances by 1 s per training step, and by more for everything else."""
    time = {"now": 0.0}

    class Moves(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time["now"] += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            time["now"] += 0.5

        def on_train_epoch_end(self) -> None:
            time["now"] += 10

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time["now"] += 100

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            time["now"] += 1000

    lightning_hetero.trainer.reporting.perf_counter = lambda: time["now"]
    logger = Remembers(folder)
    trainer = make_trainer(
        HeteroStrategy(),
        2,
        logger=logger,
        log_every_n_steps=1,
        max_epochs=2,
        val_check_interval=3,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)],
    )
    trainer.fit(Moves(), DataLoader(Numbers(80), batch_size=4), DataLoader(Numbers(8), batch_size=4))
    return [s["hetero/step_seconds"] for _, s in logger.given if "hetero/step_seconds" in s]


def test_validation_and_checkpoints_are_no_part_of_a_step(tmp_path):
    """A step lasts 1.5 s from end to end, and 1 s where something came before it."""
    seconds = run_ranks(2, timed, str(tmp_path))[0]
    assert len(seconds) >= 15
    assert set(seconds) == {1.0, 1.5}
