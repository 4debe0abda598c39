"""What does `hetero` cost where there is nothing to gain: step time and memory beside plain DDP on equal CPU ranks?

Plain DDP takes part twice: as users run it today, with the C library's allocator as it is, and with the allocator set
as `hetero` sets it. So what the setting gives and what the strategy costs are separate figures.
"""

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import figures
import machine
import reports
from command_line import CONFIGURATION, add_common, check_common, name_of, parser_of, run
from figures import show_split
from reports import say
from turns import stage

_COUNTS = ("rounds", "steps", "settle")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser, quotas="100,100")
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="how often each side has its turn")
    add("--steps", type=int, default=10, help="steps that are measured of each turn")
    add("--settle", type=int, default=30, help="steps of every side before the first round")
    options = parser.parse_args(arguments)
    check_common(parser, options, _COUNTS)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    head = reports.head(
        "step time and memory of hetero beside plain DDP on equal CPU ranks",
        options,
        (*CONFIGURATION, "warm_up", *_COUNTS),
    )
    with stage(options) as ready:
        sides = {"ddp": ready.side("ddp"), "hetero": ready.side("hetero")}
        if options.allocator == "kept":
            sides = {"ddp_default": ready.side("ddp", allocator="default")} | sides
        peaks: dict[str, list[int]] = {}
        for name, side in sides.items():
            times = ready.once(side, options.settle)["seconds"]
            say(f"{name} trained {options.settle} steps, {median(times) * 1000:.0f} ms each")
        rounds: dict[str, list[list[float]]] = {name: [] for name in sides}
        names = list(sides)
        for number in range(options.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                rounds[name].append(ready.take(sides[name], options.steps))
                peaks[name] = sides[name].peaks
            say(", ".join(f"{name} {median(times[-1]) * 1000:.0f} ms" for name, times in rounds.items()))
        plans = figures.changes([(step["step"], step["split"]) for step in sides["hetero"].steps])
        return head | {
            "quotas_enforced_by": ready.quotas.means,
            "load_after": machine.load(),
            "disturbance": ready.disturbance(),
            "sides": {
                name: {
                    "seconds": figures.middle(rounds[name]),
                    "rounds": [median(times) for times in rounds[name]],
                    "peak_bytes": peaks[name],
                }
                for name in sides
            },
            "ratios": ratios(rounds),
            "peak_ratio": max(peaks["hetero"]) / max(peaks["ddp"]),
            "plans": plans,
        }


def ratios(rounds: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """How much longer or shorter steps are, within rounds.

    Returns:
        "hetero_over_ddp": step time of hetero over that of DDP with the same allocator, the tax; "gain_of_hetero" and
        "gain_of_allocator": how many times faster hetero and DDP with the same allocator are than DDP as it is.
    """
    found = {"hetero_over_ddp": figures.gain(rounds["hetero"], rounds["ddp"])}
    if "ddp_default" in rounds:
        found["gain_of_hetero"] = figures.gain(rounds["ddp_default"], rounds["hetero"])
        found["gain_of_allocator"] = figures.gain(rounds["ddp_default"], rounds["ddp"])
    return found


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    words = {"ddp_default": "DDP as it is", "ddp": "DDP, same allocator", "hetero": "hetero"}
    lines = [f"{'side':<22}{'ms a step':>11}{'peak MiB of each rank':>24}"]
    for name, side in report["sides"].items():
        peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in side["peak_bytes"])
        text = "DDP" if name == "ddp" and "ddp_default" not in report["sides"] else words[name]
        lines.append(f"{text:<22}{side['seconds'] * 1000:>11.1f}{peaks:>24}")
    texts = {
        "hetero_over_ddp": "step time of hetero over that of DDP with the same allocator",
        "gain_of_hetero": "times DDP as it is: speed of hetero",
        "gain_of_allocator": "times DDP as it is: speed of DDP with the same allocator, what the setting alone gives",
    }
    lines.append("")
    for name, ratio in report["ratios"].items():
        lines.append(f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f})  {texts[name]}")
    lines.append(f"{report['peak_ratio']:.3f}  peak memory of hetero over that of DDP with the same allocator")
    lines.append("plans: " + ", ".join(f"{show_split(split)} from {step}" for step, split in report["plans"]))
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    run(options, name_of("tax", options), measure, table)


if __name__ == "__main__":
    main()
