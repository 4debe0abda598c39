"""The command `lightning-hetero demo`: runs the comparison, prints the results, and writes the files."""

import json
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from lightning_hetero.demo import picture
from lightning_hetero.demo.comparison import (
    CHECKPOINT,
    FastDeviceAlone,
    Job,
    Record,
    Round,
    Side,
    Turn,
    silence_lightning,
    train,
)
from lightning_hetero.demo.devices import choose
from lightning_hetero.demo.evaluation import Evaluation, evaluate
from lightning_hetero.demo.processes import competing, interruptible, run_ranks
from lightning_hetero.demo.recipe import Recipe
from lightning_hetero.demo.report import SideFigures, comparison_table, rank_table, side_figures
from lightning_hetero.demo.scene import ATTRIBUTION
from lightning_hetero.demo.schedule import Schedule

SIDES: tuple[Side, ...] = ("plain DDP", "hetero", "alone")

CPU_SETTINGS = "\n  On all three sides each rank has one thread, and its allocator keeps memory for the next step."


def main(out: Path, max_steps: int | None = None) -> None:
    """Run the demo.

    Args:
        out: the folder for the results; it is made if it does not exist.
        max_steps: optimizer steps of the `hetero` run, the comparison included; None: those of the usual schedule.
    """
    began = time.monotonic()
    job = Job(choose(), Recipe(), Schedule.within(max_steps), out)
    silence_lightning()
    prepare_folder(out)
    with interruptible():
        records = run(job)
    sides = {side: side_figures(records, side, job) for side in SIDES}
    print_comparison(job, sides)
    evaluation = evaluate(out / CHECKPOINT, job.recipe)
    picture.draw(evaluation, job.schedule.max_steps, out / "landcover.png")
    shutil.copyfile(out / "hetero" / "plan.jsonl", out / "plan.jsonl")
    seconds = time.monotonic() - began
    summary = summarize(job, sides, evaluation, records[0].local_batches, seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print_result(job, evaluation, seconds)


def prepare_folder(out: Path) -> None:
    """Make the folder, and remove the results of an earlier demo."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("landcover.png", "summary.json", CHECKPOINT, "plan.jsonl", "hetero/plan.jsonl"):
        (out / name).unlink(missing_ok=True)


def run(job: Job) -> list[Record]:
    """Start the competitors and the ranks, and wait for the ranks; rank 0's record gets the fast device's turns."""
    devices = job.devices
    alone = FastDeviceAlone(job, partial(print_round, job))
    with competing(devices.competitors, devices.cores[-1] if devices.cores else -1) as competitors:
        print_beginning(job, competitors)
        spawn = devices.accelerator == "cuda"
        records: list[Record] = run_ranks(partial(train, job), devices.world_size, alone.take_turn, spawn=spawn)
    records[0].turns["alone"] = alone.turns
    return records


def print_beginning(job: Job, competitors: list[int]) -> None:
    """Print what is about to happen."""
    recipe, schedule = job.recipe, job.schedule
    print("Land cover from Sentinel-2, trained on devices of unequal speed.\n")
    for rank, name in enumerate(job.devices.names):
        print(f"  rank {rank}: {name}")
    if competitors:
        print(
            f"\n  No unequal GPUs here. So that one device is slow, this demo has started "
            f"{'a process' if len(competitors) == 1 else f'{len(competitors)} processes'}\n  that keeps its core busy "
            f"(process {', '.join(map(str, competitors))}) and ends with it."
        )
    print(
        f"\n  TorchGeo's SemanticSegmentationTask (FCN, {recipe.filters} filters) on 13 bands; patches of "
        f"{recipe.patch_size} × {recipe.patch_size} pixels,\n  {recipe.global_batch} to a global batch. After "
        f"{schedule.learning} steps in which hetero measures the speeds, it, plain DDP and the fast\n  device alone "
        f"take turns, {schedule.rounds} × {schedule.steps} steps each; then hetero goes on, up to step "
        f"{schedule.max_steps}.{CPU_SETTINGS if job.devices.accelerator == 'cpu' else ''}\n",
        flush=True,
    )


def print_round(job: Job, finished: Round, alone: Turn) -> None:
    """Print one line after each round of turns, in place of the progress bar."""
    plain, hetero, fast = (
        f"{job.recipe.global_batch / median(step.seconds for step in steps):5.1f}"
        for steps in (finished.ddp, finished.hetero, alone.steps)
    )
    split = " + ".join(map(str, finished.local_batches))
    start = "\r\x1b[K" if sys.stdout.isatty() else "\n"
    print(
        f"{start}round {finished.number} of {job.schedule.rounds}: plain DDP {plain} images/s, "
        f"hetero {hetero} ({split}), the fast device alone {fast}",
        flush=True,
    )


def print_comparison(job: Job, sides: dict[Side, SideFigures]) -> None:
    """Print the two tables, and what they mean."""
    hetero, plain, alone = sides["hetero"], sides["plain DDP"], sides["alone"]
    print(
        "",
        f"hetero, over the {hetero.steps} steps that are compared:",
        rank_table(hetero, job.devices.names),
        "",
        f"All three (images/s: the global batch of {job.recipe.global_batch} by the median time of a step):",
        comparison_table(sides),
        "",
        f"hetero trains {hetero.images_per_second / plain.images_per_second:.2f}× as fast as plain DDP, and "
        f"{hetero.images_per_second / alone.images_per_second:.2f}× as fast as the fast device alone.",
        f"Of its first {hetero.batches} global batches, {hetero.same_batches} are those that plain Lightning draws on "
        f"one device; of plain DDP's, {plain.same_batches}.",
        f"After them, its weights are {hetero.weights:.2%} away from those trained on one device; plain DDP's, "
        f"{plain.weights:.0%}.",
        sep="\n",
        flush=True,
    )


def print_result(job: Job, evaluation: Evaluation, seconds: float) -> None:
    """Print how good the model is, and where the results are."""
    print(
        "",
        "On the labelled pixels of the validation columns, which were never trained on:",
        f"  accuracy {evaluation.accuracy:.3f}; always naming the most frequent class: "
        f"{evaluation.majority_accuracy:.3f}; mean IoU {evaluation.mean_iou:.3f}",
        "",
        f"In {job.out}: landcover.png, summary.json, {CHECKPOINT}, plan.jsonl. {seconds:.0f} s in all.",
        *ATTRIBUTION.split(" · "),
        sep="\n",
        flush=True,
    )


def summarize(
    job: Job,
    sides: dict[Side, SideFigures],
    evaluation: Evaluation,
    local_batches: tuple[int, ...],
    seconds: float,
) -> dict[str, Any]:
    """The content of `summary.json`: all figures, for use by programs."""
    rates = {side: figures.images_per_second for side, figures in sides.items()}
    return {
        "ddp_images_per_second": rates["plain DDP"],
        "hetero_images_per_second": rates["hetero"],
        "alone_images_per_second": rates["alone"],
        "speedup": rates["hetero"] / rates["plain DDP"],
        "speedup_over_alone": rates["hetero"] / rates["alone"],
        "ddp_idle": sides["plain DDP"].idle,
        "hetero_idle": sides["hetero"].idle,
        "same_global_batches": sides["hetero"].same_batches == sides["hetero"].batches,
        "ddp_same_global_batches": sides["plain DDP"].same_batches == sides["plain DDP"].batches,
        "val_accuracy": evaluation.accuracy,
        "majority_accuracy": evaluation.majority_accuracy,
        "miou": evaluation.mean_iou,
        "iou": evaluation.iou,
        "local_batches": list(local_batches),
        "sides": {side: asdict(figures) for side, figures in sides.items()},
        "recipe": asdict(job.recipe),
        "schedule": asdict(job.schedule),
        "devices": asdict(job.devices),
        "hardware": {"machine": platform.machine(), "processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lightning", "torch", "torchgeo", "torchmetrics")},
        },
        "seconds": seconds,
    }


def processor() -> str:
    """The CPU's name, where the system says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
