"""How long does a validation take, beside plain DDP's, on unequal CPU ranks?

Each side trains a little first, then validates in turns. Plain DDP gives every rank the same number of samples, and
repeats some to make them so; `hetero` evaluates each sample once, in steps that it splits by what its own evaluation
batches took before.
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

_COUNTS = ("rounds", "evaluations", "settle", "samples")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--samples", type=int, default=1003, help="samples of an evaluation; batches are those of training")
    add("--rounds", type=int, default=5, help="how often each side has its turn")
    add("--evaluations", type=int, default=2, help="evaluations that are measured of each turn")
    add("--settle", type=int, default=20, help="steps of training before the first evaluation")
    options = parser.parse_args(arguments)
    check_common(parser, options, _COUNTS)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    head = reports.head(
        "time of an evaluation by hetero beside plain DDP's, on unequal CPU ranks",
        options,
        (*CONFIGURATION, "warm_up", *_COUNTS),
    )
    with stage(options) as ready:
        from tasks import Evaluation

        evaluation = Evaluation(options.settle, options.samples)
        sides = {name: ready.side(name, evaluation=evaluation) for name in ("ddp", "hetero")}
        rounds: dict[str, list[list[float]]] = {name: [] for name in sides}
        first = {name: ready.once(side, 1)["seconds"][0] for name, side in sides.items()}
        say(", ".join(f"first evaluation of {name} {seconds:.2f} s" for name, seconds in first.items()))
        names = list(sides)
        for number in range(options.rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                rounds[name].append(ready.take(sides[name], options.evaluations))
            say(", ".join(f"{name} {median(times[-1]):.2f} s" for name, times in rounds.items()))
        return head | {
            "quotas_enforced_by": ready.quotas.means,
            "load_after": machine.load(),
            "disturbance": ready.disturbance(),
            "sides": {
                name: {
                    "first_seconds": first[name],
                    "seconds": figures.middle(rounds[name]),
                    "rounds": [median(times) for times in rounds[name]],
                    "samples_of_ranks": sides[name].steps[-1]["split"],
                }
                for name in sides
            },
            "hetero_over_ddp": figures.gain(rounds["hetero"], rounds["ddp"]),
        }


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = [f"{'side':<10}{'seconds':>10}{'the first':>12}   samples of each rank"]
    for name, side in report["sides"].items():
        lines.append(
            f"{name:<10}{side['seconds']:>10.2f}{side['first_seconds']:>12.2f}   {show_split(side['samples_of_ranks'])}"
        )
    ratio = report["hetero_over_ddp"]
    lines += ["", f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['greatest']:.3f})  time of hetero over DDP's"]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    run(options, name_of("evaluation", options), measure, table)


if __name__ == "__main__":
    main()
