"""What does finding the split cost: how fast is a fresh run of `hetero` from its first step on, and does it then rest?

Each run is a fresh set of processes that takes turns with another one which trains under the best fixed split from its
first step on, so that both pay for a process's first step. The best fixed split is searched for, or given.
"""

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import figures
import machine
import reports
from command_line import CONFIGURATION, add_common, check_common, check_splits, name_of, parser_of, run
from figures import Split, parse_split, show_split
from reports import say
from turns import Stage, judge, stage

_WINDOW = 10
"""Steps in a row whose median shows how fast a run is."""

_COUNTS = ("runs", "steps", "turn", "judge_rounds", "judge_steps", "search_steps")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--runs", type=int, default=3, help="fresh runs of hetero")
    add("--steps", type=int, default=200, help="steps of each run")
    add("--turn", type=int, default=25, help="steps of a turn")
    add(
        "--steady",
        type=int,
        default=300,
        help="steps that the last run goes on for, while its changes of plan are counted",
    )
    add("--split", type=parse_split, help="the best fixed split, such as 60/4; None searches")
    add("--search-steps", type=int, default=6, help="most steps that are measured of each split while searching")
    add("--judge-rounds", type=int, default=3, help="turns of each split that is compared with the best at the end")
    add("--judge-steps", type=int, default=6, help="measured steps of each of these turns")
    options = parser.parse_args(arguments)
    check_common(parser, options, _COUNTS)
    check_splits(parser, options, [options.split] if options.split else [])
    if options.steps % options.turn or options.turn < options.warm_up + _WINDOW:
        parser.error(f"--steps has to be a whole number of turns, and --turn at least {_WINDOW} more than --warm-up")
    return options


def one_run(stage: Stage, options: argparse.Namespace, best: Split, steady: int) -> dict[str, Any]:
    """A fresh run of hetero and a fresh run under the best fixed split, in turns.

    Args:
        stage: where.
        options: see `parse`.
        best: the fixed split.
        steady: further steps of hetero.
    """
    hetero, fixed = stage.side("hetero"), stage.side("fixed")
    learning: list[list[float]] = []
    beside: list[list[float]] = []
    for number in range(options.steps // options.turn):
        turns = [(hetero, None, learning), (fixed, best, beside)]
        for side, split, times in turns if number % 2 else turns[::-1]:
            times.append(stage.once(side, options.turn, split)["seconds"])
        say(f"steps to {len(hetero.steps)}: hetero {sum(learning[-1]):.1f} s, fixed split {sum(beside[-1]):.1f} s")
    if steady:
        stage.once(hetero, steady)
    plans = figures.changes([(step["step"], step["split"]) for step in hetero.steps])
    known = [figures.steady(times, options.warm_up) for times in beside]
    report = {
        "ratio_to_fixed": {
            "first_step_counted": figures.whole_run(learning, known, first_step=True),
            "first_step_left_out": figures.whole_run(learning, known, first_step=False),
            "fresh_fixed_run": sum(map(sum, beside)) / sum(map(sum, learning)),
        },
        "seconds": {"hetero": sum(map(sum, learning)), "fixed": sum(map(sum, beside))},
        "as_fast_from_step": figures.as_fast_from(learning, known, _WINDOW),
        "turns": [median(f) / median(figures.steady(h, options.warm_up)) for h, f in zip(learning, known, strict=True)],
        "first_step_seconds": {"hetero": learning[0][0], "fixed": beside[0][0]},
        "plans": plans,
        "plan_changes_while_steady": len([step for step, _ in plans if step >= options.steps]) if steady else None,
        "fixed_seconds": [step["seconds"] for step in fixed.steps],
        "steps": hetero.steps,
    }
    hetero.close()
    fixed.close()
    return report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    head = reports.head(
        "speed of a fresh run of hetero, exploration included, against the best fixed split",
        options,
        (*CONFIGURATION, "warm_up", *_COUNTS, "steady"),
    )
    with stage(options) as ready:
        fixed = ready.side("fixed")
        search = ready.search(fixed, options.search_steps)
        if options.split:
            search.look_at(options.split)
        else:
            search.run(options.quotas, options.global_batch)
        best, _ = judge(ready, fixed, search, (), options.judge_rounds, options.judge_steps)
        last = options.runs - 1
        runs = [one_run(ready, options, best, options.steady if n == last else 0) for n in range(options.runs)]
        used = [split for run in runs for _, split in run["plans"]]
        better, times = judge(ready, fixed, search, [best, *used], options.judge_rounds, options.judge_steps)
        for run_ in runs:
            early = figures.plans_within(run_["plans"], 0, options.steps)
            run_["settled_after_steps"] = figures.settled(early, times)
        ratios = {
            name: figures.spread([run_["ratio_to_fixed"][name] for run_ in runs]) for name in runs[0]["ratio_to_fixed"]
        }
        return head | {
            "quotas_enforced_by": ready.quotas.means,
            "load_after": machine.load(),
            "best": best,
            "best_at_the_end": better,
            "ratio_to_fixed": ratios,
            "as_fast_from_step": [run_["as_fast_from_step"] for run_ in runs],
            "settled_after_steps": [run_["settled_after_steps"] for run_ in runs],
            "plan_changes_while_steady": runs[-1]["plan_changes_while_steady"],
            "disturbance": ready.disturbance(),
            "fixed_splits": [{"split": split, "seconds": seconds} for split, seconds in sorted(times.items())],
            "runs": runs,
        }


def _each(steps: Sequence[int | None]) -> str:
    return ", ".join("never" if step is None else f"{step}" for step in steps)


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    steps = report["configuration"]["steps"]
    words = {
        "first_step_counted": "at its median in the same turns, every step of hetero counted",
        "first_step_left_out": "the same without the first step of the process",
        "fresh_fixed_run": "in a fresh run beside, every step of both counted",
    }
    lines = [
        f"speed of {steps} steps of hetero from the start, over that of the fixed split {show_split(report['best'])}"
    ]
    for name, text in words.items():
        ratio = report["ratio_to_fixed"][name]
        lines.append(f"{ratio['median']:7.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f})  {text}")
    first = [run["first_step_seconds"] for run in report["runs"]]
    medians = {name: median(seconds[name] for seconds in first) for name in ("hetero", "fixed")}
    lines.append(f"first step: hetero {medians['hetero']:.2f} s, fixed split {medians['fixed']:.2f} s")
    lines.append(
        f"{_WINDOW} steps as fast as the fixed split (within 5%) from step: {_each(report['as_fast_from_step'])}"
    )
    lines.append(f"at a split within 5% of the best one from step: {_each(report['settled_after_steps'])}")
    if report["plan_changes_while_steady"] is not None:
        more = report["configuration"]["steady"]
        lines.append(f"changes of plan in {more} more steps: {report['plan_changes_while_steady']}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    run(options, name_of("settling", options), measure, table)


if __name__ == "__main__":
    main()
