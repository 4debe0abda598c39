"""How long does it take to split a global batch over thousands of ranks, each with a step-time model of its own?"""

import argparse
import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import machine
import reports
from command_line import add_out, parser_of, run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=10_000, help="how many")
    add("--calls", type=int, default=60, help="calls that are timed, each with models of its own")
    add("--breakpoints", type=int, default=8, help="most local batches that were measured of a rank")
    add("--samples", type=int, default=64, help="most samples of the global batch for each rank, on the average")
    add("--seed", type=int, default=0)
    add_out(parser)
    options = parser.parse_args(arguments)
    if min(options.ranks, options.calls, options.breakpoints) < 1 or options.samples < 2:
        parser.error("ranks, calls and breakpoints have to be at least 1, samples at least 2")
    return options


def random_model(generator: random.Random, breakpoints: int) -> Any:
    """A piecewise linear step-time model of a device whose speed, fixed cost and bends are random."""
    from lightning_hetero.planning.step_time import StepTimeModel

    pace = 10 ** generator.uniform(-3, -1)  # seconds a sample
    batches = sorted(generator.sample(range(1, 257), generator.randint(1, breakpoints)))
    times = [pace * generator.uniform(0, 20)]
    last = 0
    for batch in batches:
        times.append(times[-1] + pace * (batch - last) * generator.uniform(0.2, 2))
        last = batch
    return StepTimeModel((0, *batches), tuple(times), pace)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time all calls."""
    from lightning_hetero.planning.allocation import allocate

    head = reports.head(
        "time to split a global batch over many ranks", options, ("ranks", "calls", "breakpoints", "samples", "seed")
    )
    generator = random.Random(options.seed)
    seconds = []
    for _ in range(options.calls):
        models = [random_model(generator, options.breakpoints) for _ in range(options.ranks)]
        global_batch = options.ranks * generator.randint(2, options.samples)
        began = time.perf_counter()
        split = allocate(models, global_batch)
        seconds.append(time.perf_counter() - began)
        if sum(split) != global_batch:
            raise RuntimeError(f"the split has {sum(split)} samples, not {global_batch}")
    milliseconds = [1000 * value for value in seconds]
    return head | {
        "load_after": machine.load(),
        "milliseconds": {"median": median(milliseconds), "greatest": max(milliseconds)},
        "calls": milliseconds,
    }


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    times, configuration = report["milliseconds"], report["configuration"]
    return (
        f"{configuration['ranks']} ranks, {configuration['calls']} calls: median {times['median']:.2f} ms, "
        f"greatest {times['greatest']:.2f} ms"
    )


def main() -> None:
    """Measure, write, show."""
    options = parse()
    run(options, f"allocation-{options.ranks}", measure, table)


if __name__ == "__main__":
    main()
