"""Runs idioms on ranks, one after the other in the same processes as long as none fails."""

import gc
import importlib
import logging
import pickle
import re
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.idioms.gallery import ONE, PATIENCE, SHARES, WORLD_SIZE, Idiom, Run, Topic, differences
from tests.ranks import RanksFailedError, run_ranks
from tests.trainer.loading import once

TOPICS = (
    "validation",
    "evaluation",
    "logged_values",
    "metrics",
    "metric_wrappers",
    "callbacks",
    "finetuning",
    "optimization",
    "data",
    "checkpoints",
    "prediction",
)


@dataclass(frozen=True)
class Outcome:
    """What an idiom returned, or the last lines of its error and all of it."""

    values: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    traceback: str = ""


def topic(name: str) -> Topic:
    return importlib.import_module(f"tests.idioms.{name}").TOPIC


def gallery() -> list[tuple[str, Idiom]]:
    """All idioms, with their topics."""
    return [(name, idiom) for name in TOPICS for idiom in topic(name).idioms]


@dataclass(frozen=True)
class Judgement:
    """Whether it is "equal", a "sentence", "differs", "fails" or "hangs"; and the numbers or errors that show it."""

    verdict: str
    details: str = ""


@once
def judgements(name: str, *modes: str) -> dict[tuple[str, str], Judgement]:
    """Of each mode and each idiom of a topic."""
    idioms = {idiom.name: idiom for idiom in topic(name).idioms}
    one = _run(name, [(ONE, idiom) for idiom in idioms])
    ranks = _run(name, [(mode, idiom) for mode in modes for idiom in idioms])
    return {
        (mode, idiom): _judge(idioms[idiom], mode, one[ONE, idiom][0], outcomes)
        for (mode, idiom), outcomes in ranks.items()
    }


def _judge(idiom: Idiom, mode: str, one: Outcome, ranks: list[Outcome]) -> Judgement:
    if one.traceback:
        return Judgement("fails", f"in one process:\n{one.traceback}")
    shown = "\n".join(f"--- rank {rank} ---\n{outcome.traceback}" for rank, outcome in enumerate(ranks))
    if idiom.sentence is not None and mode in SHARES:
        if all(re.search(idiom.sentence, outcome.message, re.DOTALL) for outcome in ranks):
            return Judgement("sentence")
        return Judgement("fails", f"no {idiom.sentence!r} in the errors of all ranks:\n{shown}")
    if any(outcome.traceback for outcome in ranks):
        hangs = any(re.search(r"Timed out|no result, exit code 1\b", outcome.message) for outcome in ranks)
        return Judgement("hangs" if hangs else "fails", shown)
    lines = differences(one.values, [outcome.values for outcome in ranks], idiom.tolerance)
    return Judgement("differs" if lines else "equal", "\n".join(lines))


def _run(name: str, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], list[Outcome]]:
    """Each job's outcomes by rank. New processes go on after one that failed: its ranks may be out of step."""
    world_size = 1 if jobs[0][0] == ONE else WORLD_SIZE
    done: dict[tuple[str, str], list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while len(done) < len(jobs):
            crash = "the process ended"
            try:
                run_ranks(world_size, _work, name, jobs, len(done), folder)
            except RanksFailedError as error:
                crash = str(error)
            begun = len(done)
            for job, key in list(enumerate(jobs))[begun:]:
                files = [Path(folder) / f"{job}-{rank}" for rank in range(world_size)]
                complete = all(file.exists() for file in files)
                if not complete and job > begun:
                    break
                done[key] = [pickle.loads(f.read_bytes()) if f.exists() else Outcome({}, crash, crash) for f in files]
                if not complete:
                    break
    return done


def _work(name: str, jobs: list[tuple[str, str]], first: int, folder: str) -> None:
    """Run jobs on this rank until one fails on any rank."""
    idioms = {idiom.name: idiom for idiom in topic(name).idioms}
    # Lightning and torchmetrics advise against much of what is in here; the values are what counts.
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    gc.freeze()  # so that collecting looks at an idiom's objects only, not at all that is imported
    dist.barrier()  # before one rank leaves the group in which the other one may still be arriving
    for job, (mode, idiom) in list(enumerate(jobs))[first:]:
        # Each idiom in a group of its own, which is waited for until the other rank has come out of the last one.
        dist.destroy_process_group()
        if mode != ONE:
            store = dist.FileStore(f"{folder}/meeting {first} {job}", world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        place = Path(folder) / f"run {job}"
        place.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            outcome = Outcome(idioms[idiom].function(Run(mode, place)))
        except BaseException as error:  # noqa: BLE001 - it may be a SystemExit, and the test shows whatever it was
            outcome = Outcome({}, "".join(traceback.format_exception_only(error)), traceback.format_exc())
        # Process groups of the idiom end here: a loader worker of a later one would crash where it collects them.
        gc.collect()
        part = Path(folder, f"{job}-{rank}.part")
        part.write_bytes(pickle.dumps(outcome))
        part.rename(part.with_suffix(""))
        if mode == ONE:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        elif not _all_went_well(outcome):
            return


def _all_went_well(outcome: Outcome) -> bool:
    """Whether no rank has failed, and the ranks are in step."""
    failed = torch.tensor([bool(outcome.traceback)])
    try:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    except RuntimeError:
        return False
    return not failed.item()
