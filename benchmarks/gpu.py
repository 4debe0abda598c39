"""What does `hetero` cost on a CUDA GPU, what does it make the host wait for, and what does it gain on unequal shares?

One GPU is enough. First one rank has it for itself, over NCCL: step time beside plain DDP, and how often the host waits
for the device. Then two ranks share it, over gloo (NCCL wants a GPU for each), once as equals and once with other
work queued on the GPU by the second rank's process, all the time: that rank's kernels wait for it, the first one's
do not. The sides take turns in one run, as in the other benchmarks; a turn is timed as a whole, up to where the
device has finished.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import figures
import reports
import torch
from command_line import add_out, parser_of, run, splits_of
from figures import Split, show_split
from gpu_sides import WAITS, Job, Side
from reports import say

CASES = {"one": (1, False), "two": (2, False), "limited": (2, True)}  # ranks; whether the last one has to compete


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--global-batch", type=int, default=128, help="samples of a step over all ranks")
    add("--size", type=int, default=128, help="pixels of a patch's side")
    add("--filters", type=int, default=64, help="of each convolution")
    add("--rounds", type=int, default=5, help="how often each side has its turn")
    add("--steps", type=int, default=20, help="steps of a turn")
    add("--settle", type=int, default=90, help="steps of hetero before the first round")
    add("--cases", default=",".join(CASES), help="which comparisons are made")
    add("--competitor", type=int, default=3072, help="side of the matrices that the other work multiplies")
    add(
        "--splits",
        type=splits_of,
        default="96/32,104/24,112/16,116/12,120/8,123/5,126/2",
        help="fixed splits that the limited rank is tried with",
    )
    add_out(parser)
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {min(unknown)!r}; there are {', '.join(CASES)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    return options


def _in_turns(sides: dict[str, tuple[Side, Split | None]], rounds: int, steps: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            side, split = sides[name]
            if split is not None:
                side.train(3, split)  # batches of the old split are on their way
            times[name].append(side.seconds(steps))
    say(", ".join(f"{name} {median(values) * 1000:.2f} ms" for name, values in times.items()))
    return times


def compare(options: argparse.Namespace, ranks: int, *, limited: bool) -> dict[str, Any]:
    """One comparison, all sides in turns."""

    def job(kind: str) -> Job:
        competitor = options.competitor if limited else None
        return Job(kind, ranks, competitor, options.global_batch, options.size, options.filters)

    with ExitStack() as stack:
        ddp, hetero = (stack.enter_context(Side(job(kind))) for kind in ("ddp", "hetero"))
        ddp.train(options.settle // 3)
        hetero.train(options.settle)
        sides: dict[str, tuple[Side, Split | None]] = {"ddp": (ddp, None), "hetero": (hetero, None)}
        tried: list[dict[str, Any]] = []
        if limited:
            fixed = stack.enter_context(Side(job("fixed")))
            fixed.train(options.settle // 3)
            for split in options.splits:
                fixed.train(3, split)
                tried.append({"split": split, "seconds": fixed.seconds(options.steps)})
            best = min(tried, key=lambda entry: entry["seconds"])["split"]
            sides["best"] = (fixed, best)
        times = _in_turns(sides, options.rounds, options.steps)
        result: dict[str, Any] = {
            "ranks": ranks,
            "limited": limited,
            "sides": {name: {"seconds": median(values), "rounds": values} for name, values in times.items()},
            "gain_over_ddp": figures.gain([[t] for t in times["ddp"]], [[t] for t in times["hetero"]]),
            "split": hetero.train(1)[0]["splits"][-1],
        }
        if limited:
            result["gain_over_best"] = figures.gain([[t] for t in times["best"]], [[t] for t in times["hetero"]])
            result |= {"best": best, "fixed_splits": tried}
        last = {name: side.train(options.steps, profile=True) for name, (side, _) in sides.items()}
        for name, answers in last.items():
            result["sides"][name]["peak_bytes"] = [answer["peak"] for answer in answers]
            result["sides"][name]["profiled"] = [
                {"steps": options.steps, "launches": answer["launches"], **answer["waits"]} for answer in answers
            ]
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    keys = ("global_batch", "size", "filters", "rounds", "steps", "settle", "competitor")
    head = reports.head("step time and host waits of hetero on a CUDA GPU, beside plain DDP", options, keys)
    head["hardware"]["gpu"] = torch.cuda.get_device_name()
    cases = []
    for ranks, limited in (CASES[name] for name in options.cases):
        cases.append(compare(options, ranks, limited=limited))
        say(table({"cases": cases[-1:]}))
    return head | {"cases": cases}


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = []
    for case in report["cases"]:
        who = "one rank, NCCL" if case["ranks"] == 1 else "two ranks on one GPU, gloo"
        lines.append(who + (", the second one's GPU shared with other work" if case["limited"] else ""))
        for name, side in case["sides"].items():
            waits = ", ".join(f"{key} {side['profiled'][0][key]}" for key in WAITS)
            peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in side["peak_bytes"])
            lines.append(f"  {name:<8}{side['seconds'] * 1000:>8.2f} ms a step   {peaks} MiB   {waits}")
        for name in ("gain_over_ddp", "gain_over_best"):
            if name in case:
                gain = case[name]
                text = f"{gain['median']:.3f} ({gain['least']:.3f} to {gain['greatest']:.3f})"
                lines.append(f"  hetero, {name.replace('_', ' ')}: {text}, split {show_split(case['split'])}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    cases = "" if len(options.cases) == len(CASES) else f"-{'-'.join(options.cases)}"
    run(options, f"gpu-fcn-{options.size}px-b{options.global_batch}{cases}", measure, table)


if __name__ == "__main__":
    sys.exit(main())
