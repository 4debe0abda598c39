"""Reports of benchmarks are written, shown, drawn and gathered in one table."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _in_benchmarks(monkeypatch):
    """The scripts import each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name):
    return importlib.import_module(name)


def a_report(**configuration):
    sides = {name: {"split": [60, 4], "seconds": 0.5, "rounds": [0.4, 0.6]} for name in ("equal", "hetero", "best")}
    sides |= {"proportional": {"split": [51, 13], "seconds": 0.7, "rounds": [0.7, 0.7]}}
    sides |= {name: {"split": None, "seconds": 1.0, "rounds": [1.0, 1.0]} for name in ("ddp", "alone")}
    gain = {"median": 2.0, "least": 1.9, "greatest": 2.1}
    defaults = {"global_batch": 64, "model": "resnet18", "size": 64, "quotas": [100, 25], "allocator": "kept"}
    return {
        "configuration": defaults | configuration,
        "sides": sides,
        "gains": {f"hetero/{name}": gain for name in ("ddp", "alone", "equal", "proportional", "best")},
        "plan": {"split": [59, 5], "best/plan": {"median": 0.98, "least": 0.9, "greatest": 1.05}},
        "part_of_solo_rates": {name: {"median": 0.75, "least": 0.7, "greatest": 0.8} for name in ("hetero", "best")},
        "disturbance": {"median": 0.01, "greatest": 0.2},
        "quotas_enforced_by": "nothing",
        "hetero": {
            "plans": [[0, [32, 32]], [4, [60, 4]]],
            "settled_after_steps": 4,
            "steps": [{"step": 0, "seconds": 1.23456789}],
        },
    }


def test_a_report_is_written_shown_and_drawn(tmp_path):
    speed, plot = load("speed"), load("plot_speed")
    path = tmp_path / "results" / "speed.json"
    load("reports").write(a_report(), path)
    report = json.loads(path.read_text())
    assert report["hetero"]["steps"] == [{"step": 0, "seconds": 1.234568}]
    assert "2.00x (1.90 to 2.10)" in speed.table(report)
    assert "32/32 from 0, 60/4 from 4" in speed.table(report)
    assert "split 59/5 is faster than the best one by 0.98x (0.90 to 1.05)" in speed.table(report)
    assert plot.draw(path).stat().st_size > 5000


def test_a_report_has_a_line_for_each_step(tmp_path):
    steps = [{"step": step, "seconds": 0.1, "split": (60, 4), "compute": [0.1, 0.09]} for step in range(30)]
    report = {"best": (60, 4), "runs": [{"plans": [(0, (32, 32)), (4, (60, 4))], "steps": steps}] * 2}
    path = tmp_path / "report.json"
    load("reports").write(report, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    lines = path.read_text().splitlines()
    assert len([line for line in lines if '"step": 7' in line]) == 2
    assert len(lines) < 80


def a_drift_report():
    state = {
        "best_seconds": 0.4,
        "ratio_to_best": 0.9,
        "late_ratio_to_best": 0.98,
        "plans": [[0, [32, 32]]],
        "best": [60, 4],
    }
    return a_report(steps=3) | {
        "states": [
            state | {"quota": 25, "first_step": 0, "steps_until_settled": 3},
            state | {"quota": 60, "first_step": 3, "steps_until_settled": None},
            state | {"quota": 30, "first_step": 6, "steps_until_settled": 2},
        ],
        "steps": [{"step": step, "seconds": 0.5} for step in range(9)],
    }


def test_a_drift_is_shown_and_drawn(tmp_path):
    drift = load("drift")
    path = tmp_path / "drift-x.json"
    load("reports").write(a_drift_report(), path)
    text = drift.table(json.loads(path.read_text()))
    assert "quota 60% from step 3: within 5% of 60/4 (400 ms) not to the end" in text
    assert "all its steps at 90% of that split's speed, those from the 20th on at 98%" in text
    assert load("plot_drift").draw(path).stat().st_size > 5000


def test_the_tax_and_the_gain_of_the_setting_are_distinguished():
    rounds = {"ddp_default": [[2.4], [2.4]], "ddp": [[1.2], [1.2]], "hetero": [[1.26], [1.26]]}
    ratios = load("tax").ratios(rounds)
    assert ratios["hetero_over_ddp"]["median"] == pytest.approx(1.05)
    assert ratios["gain_of_allocator"]["median"] == pytest.approx(2.0)
    assert ratios["gain_of_hetero"]["median"] == pytest.approx(2.4 / 1.26)
    assert load("tax").ratios({"ddp": [[1.0]], "hetero": [[1.0]]}).keys() == {"hetero_over_ddp"}


def test_what_a_split_loses_is_broken_down():
    """60 samples a second alone and 20: 80 together. The last rank ends a step."""
    round_ = {"solo": [1.0, 3.0], "apart": [0.8, 0.75], "together": [0.8, 1.0], "averaged": [1.2]}
    script = load("limit")
    parts = script.fractions(60, [round_, round_ | {"averaged": [1.0]}, round_])
    assert {way: part["median"] for way, part in parts.items()} == pytest.approx(
        {"apart": 60 / 0.8 / 80, "together": 60 / 80, "averaged": 50 / 80}
    )
    assert parts["averaged"]["greatest"] == pytest.approx(0.75)
    one = {"median": 1.2, "least": 1.1, "greatest": 1.3}
    report = a_report(split=[45, 15]) | {"fractions": parts, "gain_over_alone": one, "gain_at_the_limit": one}
    assert " 62% (62% to 75%)  as it is trained" in script.table(report)


def test_the_overview_has_a_line_for_each_report(tmp_path):
    overview, write = load("overview"), load("reports").write
    one = {"median": 1.0, "least": 0.98, "greatest": 1.02}
    reports = {
        "speed-b": a_report(quotas=[100, 50, 25]),
        "speed-a": a_report(global_batch=256),
        "speed-c": a_report(),
        "speed-d": a_report(quotas=[100, 50]),
        "limit-a": a_report(split=[60, 4])
        | {"fractions": dict.fromkeys(("apart", "together", "averaged"), one), "gain_at_the_limit": one},
        "settling-a": a_report(steps=200, steady=300)
        | {
            "ratio_to_fixed": dict.fromkeys(("first_step_counted", "first_step_left_out", "fresh_fixed_run"), one),
            "settled_after_steps": [7, None],
            "as_fast_from_step": [5, None],
            "plan_changes_while_steady": 1,
        },
        "drift-a": a_drift_report(),
        "tax-a": a_report() | {"ratios": {"hetero_over_ddp": one}, "peak_ratio": 1.01},
        "cpu-a": a_report() | {"sides": {"pinned": {}}, "ratios": {"not pinned": one}},
        "evaluation-a": a_report()
        | {
            "hetero_over_ddp": one,
            "sides": {"ddp": {"samples_of_ranks": [502, 502]}, "hetero": {"samples_of_ranks": [803, 200]}},
        },
        "allocation-a": {"configuration": {"ranks": 10_000}, "milliseconds": {"median": 6.5, "greatest": 9.1}},
    }
    del reports["speed-c"]["part_of_solo_rates"], reports["speed-c"]["configuration"]["allocator"]
    for name, report in reports.items():
        write(report, tmp_path / f"{name}.json")
    found = overview.read(tmp_path)
    lines = overview.overview(found).splitlines()
    speed = [line for line in lines if line.startswith("| ResNet-18")]
    assert [line.split(" | ")[0] for line in speed] == [
        "| ResNet-18, 64 px, 100/50, B 64",
        "| ResNet-18, 64 px, 100/25, B 64, allocator as it is",
        "| ResNet-18, 64 px, 100/25, B 256",
        "| ResNet-18, 64 px, 100/50/25, B 64",
    ]
    assert all(line.count("2.00 (1.90 to 2.10)") == 5 for line in speed)
    questions = ["limit", "settling", "drift", "evaluation", "tax", "cpu", "allocation"]
    assert [line.split(" | ")[0] for line in lines[-7:]] == [f"| `{question}`" for question in questions]
    assert "as fast within 5% from step 5, never, at a split within 5% of the best one from step 7, not" in lines[-6]
    assert "split 60/4 reaches 1.00 (0.98 to 1.02) with every rank by itself" in lines[-7]
    assert "from 25% to 60%: not within 5%" in lines[-5]
    assert "from 60% to 30%: after 2 steps within 5% of the best fixed split, 0.98 of its speed" in lines[-5]
    assert "803/200 beside 502/502" in lines[-4]
    assert "not pinned: 1.00 (0.98 to 1.02)" in lines[-2]
    assert lines[-1].endswith("6.5 ms, at most 9.1 ms |")
    picture = load("plot_overview").draw(found["speed"], tmp_path / "overview.png")
    assert picture.stat().st_size > 5000


def test_an_overview_of_nothing_says_so(tmp_path):
    assert load("overview").overview(load("overview").read(tmp_path)) == "there are no reports"


def test_random_models_are_split_completely():
    script = load("allocation")
    report = script.measure(script.parse(["--ranks", "50", "--calls", "3"]))
    assert len(report["calls"]) == 3
    assert "50 ranks, 3 calls" in script.table(report)
