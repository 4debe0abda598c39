"""The command `lightning-hetero demo`, as a user runs it, but shorter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_hetero.cli.main import main

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")

COMMAND = [sys.executable, "-m", "lightning_hetero.cli.main", "demo"]


def processes_of(session):
    """Process numbers of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(owner) == session and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.fixture
def start(tmp_path):
    """Start a command in a session of its own, as a terminal does; afterwards nothing of it is left."""
    started = []

    def start(command):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        started.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_short_demo_leaves_all_that_it_promises(start, tmp_path):
    process = start([*COMMAND, "--out", "results", "--max-steps", "8"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    out = tmp_path / "results"
    assert (out / "landcover.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "landcover.ckpt").stat().st_size > 100_000
    events = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())

    # every plan is a split of the same global batch, and the first one is what DDP would do, unless a probe says more
    assert {sum(event["local_batches"]) for event in events if event["event"] == "plan"} == {48}
    assert events[0]["reason"] == "probe" or events[0]["local_batches"] == [24, 24]
    assert sum(summary["local_batches"]) == 48
    rates = [summary[f"{side}_images_per_second"] for side in ("ddp", "hetero", "alone")]
    assert all(rate > 0 for rate in rates)
    assert summary["speedup"] == pytest.approx(rates[1] / rates[0])
    assert 0.3 < summary["majority_accuracy"] < 0.33
    assert 0 <= summary["miou"] <= summary["val_accuracy"] <= 1
    # what matters most: two ranks train on the global batches of one, which plain DDP does not
    assert summary["same_global_batches"]
    assert not summary["ddp_same_global_batches"]
    assert summary["sides"]["hetero"]["weights"] < 0.01 * summary["sides"]["plain DDP"]["weights"]

    for promised in ("rank", "idle", "plain DDP", "accuracy", "mean IoU", "Copernicus", "OpenStreetMap"):
        assert promised in output
    assert wait_until(lambda: not processes_of(process.pid), 10), "processes outlive the demo"


def test_ctrl_c_ends_all_processes_at_once(start, tmp_path):
    """A terminal sends the signal to all of them; ranks that answered it themselves would hang in an all-reduce."""
    process = start([*COMMAND, "--out", "results"])
    # the first plan is written when training begins
    begun = tmp_path / "results" / "hetero" / "plan.jsonl"
    assert wait_until(lambda: begun.exists() or process.poll() is not None, 120)
    assert len(processes_of(process.pid)) >= 4, "the command itself, its competitor and two ranks"
    os.killpg(process.pid, signal.SIGINT)
    assert wait_until(lambda: not processes_of(process.pid), 10), processes_of(process.pid)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130, output
    assert "stopped; all processes have ended" in output
    assert "Traceback" not in output


FAILS_THEN_WAITS = """
import time
from lightning_hetero.demo.processes import competing, run_ranks

def fails(rank, request):
    if rank == 1:
        raise ValueError("no such band")
    request("anything")
    time.sleep(600)

def waits(rank, request):
    print("rank", rank, flush=True)
    time.sleep(600)

try:
    run_ranks(fails, 2, lambda content: None, spawn=False)
except RuntimeError as error:
    print(repr(str(error)), flush=True)
with competing(1, -1):
    run_ranks(waits, 2, lambda content: None, spawn=False)
"""


def test_nothing_outlives_a_rank_that_fails_nor_a_demo_that_is_killed(start):
    """Where the demo itself is killed, only the kernel is left to end the others."""
    process = start([sys.executable, "-c", FAILS_THEN_WAITS])
    failure = process.stdout.readline()
    assert "rank 1 failed" in failure
    assert "no such band" in failure
    assert {process.stdout.readline() for _ in range(2)} == {"rank 0\n", "rank 1\n"}
    assert len(processes_of(process.pid)) == 4  # none of the first two ranks is left

    os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes_of(process.pid), 10), processes_of(process.pid)


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "lightning-hetero" in capsys.readouterr().out


def test_too_few_steps_are_refused_in_one_sentence(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--max-steps", "3"]) == 1
    assert capsys.readouterr().err == (
        "lightning-hetero demo: --max-steps 3 leaves no steps to compare: give 6 or more\n"
    )
