"""What a CPU rank loses to its surroundings: threads, cores that it is not pinned to, and its loader's workers.

Every side is `hetero` with equal shares on equal ranks. One has one thread a rank, pinned to a core, and no loader
workers, as in all other benchmarks; in each of the others one thing differs.
"""

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import figures
import machine
import reports
from command_line import CONFIGURATION, add_common, check_common, name_of, parser_of, run
from reports import say
from turns import stage

_COUNTS = ("rounds", "steps")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser, quotas="100,100")
    add = parser.add_argument
    add("--rounds", type=int, default=6, help="how often each side has its turn")
    add("--steps", type=int, default=10, help="steps of each turn, those of the warm-up included")
    options = parser.parse_args(arguments)
    check_common(parser, options, _COUNTS)
    options.no_groups = True  # a quota of one core would forbid more threads
    if set(options.quotas) != {100}:
        parser.error("--quotas have to be 100 for every rank: what is compared are equal ranks")
    if options.steps <= options.warm_up:
        parser.error("--steps has to be more than --warm-up")
    return options


def settings(ranks: int) -> dict[str, dict[str, Any]]:
    """What differs on the sides (see `sides.Setting`), by name; the first is what the others are compared with."""
    return {
        "pinned": {},
        "not pinned": {"pinned": False},
        f"{ranks} threads a rank, not pinned": {"threads": ranks, "pinned": False},
        "one loader worker a rank, on the rank's core": {"workers": 1},
        "one loader worker a rank, not pinned": {"workers": 1, "pinned": False},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    question = "what threads, cores and loader workers cost a CPU rank"
    head = reports.head(question, options, (*CONFIGURATION, "warm_up", *_COUNTS))
    del head["threads_per_rank"]  # it is what is compared
    with stage(options) as ready:
        chosen = settings(len(options.quotas))
        sides = {name: ready.side("fixed", **setting) for name, setting in chosen.items()}
        for side in sides.values():
            ready.once(side, options.steps)
        rounds: dict[str, list[list[float]]] = {name: [] for name in sides}
        names = list(sides)
        for number in range(options.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                # Whose time is whose can't be distinguished here, so no turn is taken again.
                rounds[name].append(ready.once(sides[name], options.steps)["seconds"][options.warm_up :])
            say(", ".join(f"{name} {median(times[-1]) * 1000:.0f} ms" for name, times in rounds.items()))
        return head | {
            "quotas_enforced_by": ready.quotas.means,
            "load_after": machine.load(),
            "sides": {name: {"seconds": figures.middle(times)} for name, times in rounds.items()},
            "ratios": ratios(rounds),
        }


def ratios(rounds: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """How much longer a step takes than on the first side, within rounds."""
    first, *others = rounds
    return {name: figures.gain(rounds[name], rounds[first]) for name in others}


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = [f"{'side':<46}{'ms a step':>10}   times as long"]
    for name, side in report["sides"].items():
        ratio = report["ratios"].get(name)
        text = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})" if ratio else ""
        lines.append(f"{name:<46}{side['seconds'] * 1000:>10.1f}   {text}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    run(options, name_of("cpu", options), measure, table)


if __name__ == "__main__":
    main()
