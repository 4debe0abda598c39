"""How soon does `hetero` follow a device that becomes faster or slower while it trains?

A rank's quota is changed while a real `Trainer.fit` goes on, and later once more. With each quota the best fixed split
is searched for in the same run, while `hetero` is paused.
"""

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import figures
import machine
import reports
from command_line import CONFIGURATION, add_common, check_common, name_of, parser_of, run
from figures import LATE, Split, show_split
from reports import say
from searching import Search
from turns import judge, stage

_COUNTS = ("steps", "before", "search_steps", "judge_rounds", "judge_steps")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--changes", type=_changes, default="60,25", help="the quotas that the last rank has one after the other")
    add("--steps", type=int, default=60, help="steps at the start, and after each change")
    add("--before", type=int, default=5, help="steps of hetero in the same turn before each change")
    add("--search-steps", type=int, default=6, help="most steps that are measured of each split while searching")
    add("--judge-rounds", type=int, default=3, help="turns of each split that is compared with the best")
    add("--judge-steps", type=int, default=6, help="measured steps of each of these turns")
    add("--plot", action="store_true", help="draw the report as well")
    options = parser.parse_args(arguments)
    check_common(parser, options, _COUNTS)
    if options.steps <= LATE:
        parser.error(f"--steps has to be more than {LATE}: what comes later shows whether the change has been followed")
    if options.quotas[-1] == 100:
        parser.error("the last rank's quota has to be below 100, so that it can change")
    return options


def _changes(text: str) -> list[int]:
    quotas = [int(part) for part in text.split(",")]
    if any(not 10 <= quota < 100 for quota in quotas):
        raise ValueError(f"quotas to change to are percents of a core from 10 to 99, got {text}")
    return quotas


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    head = reports.head(
        "steps until hetero follows a change of a device's speed",
        options,
        (*CONFIGURATION, "changes", "warm_up", *_COUNTS),
    )
    *others, first = options.quotas
    rank = len(others)
    searches: dict[int, Search] = {}
    states: list[dict[str, Any]] = []
    with stage(options, [*others, max(first, *options.changes)]) as ready:
        fixed, hetero = ready.side("fixed"), ready.side("hetero")
        for number, quota in enumerate([first, *options.changes]):
            before = options.before if number else 0
            began = len(hetero.steps) + before
            if number:
                change = {"mark": before, "on_mark": lambda quota=quota: ready.quotas.change(rank, quota)}
                ready.once(hetero, before + options.steps, **change)
            else:
                ready.once(hetero, options.steps)
            if quota not in searches:
                searches[quota] = ready.search(fixed, options.search_steps)
                searches[quota].run([*others, quota], options.global_batch)
            plans = figures.changes([(step["step"], step["split"]) for step in hetero.steps])
            plans = figures.plans_within(plans, began, began + options.steps)
            used = [split for _, split in plans]
            best, times = judge(ready, fixed, searches[quota], used, options.judge_rounds, options.judge_steps)
            states.append(_state(quota, began, plans, best, times, hetero.steps[began:]))
            say(describe(states[-1]))
        return head | {
            "quotas_enforced_by": ready.quotas.means,
            "load_after": machine.load(),
            "disturbance": ready.disturbance(),
            "states": states,
            "steps": hetero.steps,
        }


def _state(
    quota: int,
    began: int,
    plans: Sequence[tuple[int, Split]],
    best: Split,
    times: dict[Split, float],
    steps: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What was found out about the steps from `began` on, that the rank had `quota` in."""
    settled = figures.settled(plans, times)
    seconds = [step["seconds"] for step in steps]
    return {
        "quota": quota,
        "first_step": began,
        "best": best,
        "best_seconds": times[best],
        "plans": plans,
        "steps_until_settled": None if settled is None else settled - began,
        "ratio_to_best": len(seconds) * times[best] / sum(seconds),
        "late_ratio_to_best": times[best] / median(seconds[LATE:]),
        "fixed_splits": [{"split": split, "seconds": time} for split, time in sorted(times.items())],
    }


def describe(state: dict[str, Any]) -> str:
    """A state in a line."""
    settled = state["steps_until_settled"]
    when = "not to the end" if settled is None else f"after {settled} steps"
    plans = ", ".join(f"{show_split(split)} from {step}" for step, split in state["plans"])
    best = f"{show_split(state['best'])} ({state['best_seconds'] * 1000:.0f} ms)"
    return (
        f"quota {state['quota']}% from step {state['first_step']}: within 5% of {best} {when}; "
        f"all its steps at {state['ratio_to_best']:.0%} of that split's speed, those from the {LATE}th on at "
        f"{state['late_ratio_to_best']:.0%}; plans {plans}"
    )


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    return "\n".join([*map(describe, report["states"]), f"quotas: {report['quotas_enforced_by']}"])


def main() -> None:
    """Measure, write, show."""
    options = parse()
    changes = "-".join(map(str, options.changes))
    path = run(options, f"{name_of('drift', options)}-then-{changes}", measure, table)
    if options.plot:
        import plot_drift

        print(plot_drift.draw(path))


if __name__ == "__main__":
    main()
