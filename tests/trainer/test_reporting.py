"""What a user sees of a run: tables, scalars, who does not pay, and what was gained."""

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lightning_hetero.trainer.observer
from lightning_hetero import HeteroStrategy
from lightning_hetero.planning.memory import MemoryLimits
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.planning.shares import Shares
from lightning_hetero.trainer.observer import Observer
from lightning_hetero.trainer.reporting import Ending, Outlook, PlanLog, about, differs, duration, table
from tests.planning.stepping import memory_reports, take
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer


def test_a_table_shows_what_is_known():
    text = table(Plan(7, (48, 16), (0.5, 0.4), "balance"), ["cpu", "NVIDIA X"], [2.0**30, 2.0**31])
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
def test_durations_have_three_figures(seconds, text):
    assert duration(seconds) == text


def test_predicted_global_batches_have_two_figures():
    assert [about(n) for n in (1, 9, 10, 87, 90, 101, 1234)] == [1, 9, 10, 87, 90, 110, 1300]


def test_who_does_not_pay_is_said_in_one_sentence():
    devices = ["cpu", "cpu", "NVIDIA X"]
    assert Outlook(64, 0.43, 0.4, {}, 4096).sentence(devices) is None
    assert Outlook(64, 0.4312, 0.4, {1: 87}, 4096).sentence(devices) == (
        "hetero: rank 1 (cpu) does not pay at a global batch of 64: without it a step would take 0.400 s instead of "
        "0.431 s; from a global batch of about 87 on it would"
    )
    assert Outlook(64, 0.4312, 0.4, {1: None}, 4096).sentence(devices) == (
        "hetero: rank 1 (cpu) does not pay at a global batch of 64: without it a step would take 0.400 s instead of "
        "0.431 s; it would not at any up to 4096"
    )
    assert Outlook(64, 0.4312, 0.4, {2: None, 1: 123}, 4096).sentence(devices) == (
        "hetero: ranks 2 (NVIDIA X) and 1 (cpu) do not pay at a global batch of 64: without them a step would take "
        "0.400 s instead of 0.431 s; rank 2 would not at any up to 4096, rank 1 would from about 130 on"
    )


def test_the_end_is_said_in_one_sentence():
    assert Ending((4, 4), 0.5).sentence() is None, "nothing was learnt"
    whole = Ending((48, 16), 0.4, 0.8, predicted_gain=2.2, limit=200.0)
    assert whole.sentence() == (
        "hetero: a step took 0.400 s, 2.20 times as fast as an equal split by the models, 2.00 times as measured "
        "(0.800 s before); 160 samples/s are 80% of the 200 that all devices reach one by one"
    )
    assert "measured" not in Ending((48, 16), 0.4, None, predicted_gain=2.2, limit=200.0).sentence()
    unequal = Ending((48, 16), 0.4, 0.6, began_equal=False, predicted_gain=2.2, limit=200.0)
    assert "by the models, 1.50 times as fast as at its first split as measured (0.600 s before)" in unequal.sentence()
    assert (unequal.event(99)["first_step_seconds"], unequal.event(99)["measured_gain"]) == (0.6, None)
    event = whole.event(99)
    assert (event["measured_gain"], event["predicted_gain"], event["fraction_of_limit"]) == (2.0, 2.2, 0.8)


@pytest.mark.parametrize(
    ("device", "limit", "pays"),
    [("cpu", math.inf, False), ("cpu", 63.0, True), ("NVIDIA X", math.inf, True)],
)
def test_who_does_not_pay_depends_on_memory_and_on_the_kind_of_device(tmp_path, device, limit, pays):
    """Rank 0 alone would take 1 s less 0.08 on a CPU, both together take 0.97 s; with room for 63 it can't do it."""
    devices = [device] * 2
    planner = SplitPlanner(Shares.parse("auto"), 2, 64, memory=MemoryLimits((limit, math.inf), tuple(devices)))
    for step in range(4):
        split = planner.schedule.at(step).local_batches
        memory = memory_reports(*((b, float(b)) for b in split))
        take(planner, step, [split[0] / 64, 0.2 + split[1] / 2.6], memory=memory)
    Observer(None, planner, devices, 1, str(tmp_path))._look_out(10)
    *_, event = map(json.loads, (tmp_path / "hetero" / "plan.jsonl").read_text().splitlines())
    assert event["event"] == "outlook"
    assert [each["rank"] for each in event["left_out"]] == ([] if pays else [1])


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


class Messages(logging.Handler):
    """What is said on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Remembers(CSVLogger):
    """A logger that remembers what it was given, on any rank."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="run")
        self.given: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.given.append((step, metrics))
        super().log_metrics(metrics, step)


def observed(folder: str, module: Any, global_batch: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    messages, logger = Messages(), Remembers(folder)
    strategy = HeteroStrategy(global_batch=global_batch, **options.pop("strategy", {}))
    trainer = make_trainer(strategy, 2, **{"max_epochs": 1, "logger": logger, "log_every_n_steps": 5, **options})
    trainer.fit(module(), DataLoader(Numbers(global_batch * steps), batch_size=global_batch // 2))
    path = Path(trainer.log_dir or trainer.default_root_dir) / "hetero" / "plan.jsonl"
    metrics = Path(logger.log_dir) / "metrics.csv"
    return {
        "said": [text for text in messages.said if text.startswith("hetero")],
        "given": logger.given,
        "events": [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [],
        "rows": list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else [],
        "schedule": [plan.local_batches for plan in strategy._planner.schedule.plans],
        "left": strategy._observer,
    }


def test_a_rank_that_does_not_pay_is_named_once(tmp_path):
    first, second = run_ranks(2, observed, str(tmp_path), Fixed, 16, 60, {})
    sentences = [text for text in first["said"] if "does not pay" in text]
    assert len(sentences) == 1, first["said"]
    assert sentences[0].startswith("hetero: rank 1 (cpu) does not pay at a global batch of 16: without it a step would")
    (event,) = [event for event in first["events"] if event["event"] == "outlook"]
    assert event["global_batch"] == 16
    assert event["predicted_seconds"] > 1.02 * event["predicted_seconds_without"]
    (left_out,) = event["left_out"]
    assert left_out["rank"] == 1
    if left_out["pays_from"] is None:  # where something else held the rank up while it was measured
        assert sentences[0].endswith("it would not at any up to 1024")
    else:
        assert 16 < left_out["pays_from"] <= 64 * 16
        assert "from a global batch of about " in sentences[0]
    assert second["said"] == []
    assert first["left"] is second["left"] is None


def test_a_folder_that_can_not_be_written_to_is_said_once(tmp_path):
    """Training is worth more than the list of its plans."""
    (tmp_path / "hetero").write_text("a file stands where the folder should be")
    log = PlanLog(tmp_path)
    with pytest.warns(UserWarning, match="the plans of this run are not written down"):
        log.add({"event": "plan"})
    log.add({"event": "plan"})


def test_the_end_says_what_was_gained(tmp_path):
    first, _ = run_ranks(2, observed, str(tmp_path), Slow, 32, 40, {})
    # Whether a rank pays in steps of a few milliseconds is the machine's business; it is said where it is written.
    (outlook,) = [event for event in first["events"] if event["event"] == "outlook"]
    assert len(outlook["left_out"]) == sum("does not pay" in text for text in first["said"])
    end = first["events"][-1]
    assert end["event"] == "end"
    assert end["step"] == 39
    assert end["local_batches"] in [list(split) for split in first["schedule"]]
    assert end["predicted_gain"] > 1
    equal = end["equal_step_seconds"]
    assert end["measured_gain"] == (equal / end["step_seconds"] if equal else None), "if its first split was equal"
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
    assert [tuple(plan["local_batches"]) for plan in plans] == first["schedule"]
    tables = [text for text in first["said"] if text.startswith("hetero: global batch 32 from step ")]
    shown, expected = (0, 0), 0
    for plan in plans:
        if abs(plan["local_batches"][0] - shown[0]) > 1:
            shown, expected = plan["local_batches"], expected + 1
    assert len(tables) == expected >= 2


def test_who_stays_at_fixed_shares_has_only_measured_what_it_is(tmp_path):
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
    Observer._log_scalars = refuse
    return observed(folder, Slow, 16, 10, {"logger": False})


def test_without_a_logger_nothing_is_computed_for_one(tmp_path):
    first, _ = run_ranks(2, silent, str(tmp_path))
    assert first["rows"] == []
    assert first["said"]


def timed(folder: str) -> Any:
    """The clock of the observer is moved on by what happens: 1 s a training step, more for what is none."""
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

    lightning_hetero.trainer.observer.perf_counter = lambda: time["now"]
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
