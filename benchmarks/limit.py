"""What keeps unequal devices from the sum of what each does alone: fixed costs, running side by side, or averaging?

Each round measures one split in four ways: every rank by itself with the whole global batch, which gives the sum of
their rates; every rank by itself with its own part of the split; all of them at the same time, without exchanging
anything; and the split as it is trained, with averaged gradients.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import figures
import machine
import reports
from command_line import CONFIGURATION, add_common, check_common, check_splits, name_of, parser_of, run
from figures import parse_split, show_split
from reports import say
from turns import Stage, stage

_COUNTS = ("rounds", "steps")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--split", type=parse_split, default="60/4", help="local batches of all ranks, a good split")
    add("--rounds", type=int, default=5, help="how often each way has its turn")
    add("--steps", type=int, default=4, help="steps that are measured of each turn")
    options = parser.parse_args(arguments)
    check_common(parser, options, _COUNTS)
    check_splits(parser, options, [options.split])
    return options


class Ways:
    """The four ways to compute a split.

    Args:
        options: see `parse`.
        stage: where they take turns.
    """

    def __init__(self, options: argparse.Namespace, stage: Stage) -> None:
        self._options = options
        self._stage = stage
        self._solo = [stage.side("alone", [rank]) for rank in range(len(options.quotas))]
        self._parts = [stage.side("alone", [rank], global_batch=b) for rank, b in enumerate(options.split)]
        self._whole = stage.side("fixed")

    def measure(self) -> dict[str, list[float]]:
        """Seconds of a step: each rank with the global batch, each part by itself, parts side by side, the split."""
        steps = self._options.steps
        return {
            "solo": [median(self._stage.take(side, steps)) for side in self._solo],
            "apart": [median(self._stage.take(side, steps)) for side in self._parts],
            "together": self._in_company(),
            "averaged": [median(self._stage.take(self._whole, steps, self._options.split))],
        }

    def _in_company(self) -> list[float]:
        # The parts of a good split take about equally long, so that nearly all of their steps overlap. Whose time
        # is whose can't be distinguished here, so this turn is not taken again.
        warm_up = self._options.warm_up
        with ThreadPoolExecutor(len(self._parts)) as pool:
            results = pool.map(lambda side: side.train(warm_up + self._options.steps)["seconds"], self._parts)
            return [median(figures.steady(seconds, warm_up)) for seconds in results]


def fractions(global_batch: int, rounds: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Of the sum of solo rates, what is reached by the parts each by itself, side by side, and with averaged gradients.

    Args:
        global_batch: samples in a step.
        rounds: see `Ways.measure`; the last rank that is done ends a step.

    Returns:
        for each of the three the median over the rounds, the least and the greatest.
    """
    limits = [sum(global_batch / seconds for seconds in times["solo"]) for times in rounds]
    return {
        way: figures.spread(
            [global_batch / max(times[way]) / limit for times, limit in zip(rounds, limits, strict=True)]
        )
        for way in ("apart", "together", "averaged")
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    question = "what keeps a split from the sum of the rates that its devices reach alone"
    head = reports.head(question, options, (*CONFIGURATION, "split", "warm_up", *_COUNTS))
    with stage(options) as ready:
        ways = Ways(options, ready)
        rounds = []
        for _ in range(options.rounds):
            rounds.append(ways.measure())
            say(", ".join(f"{way} {_milliseconds(times)}" for way, times in rounds[-1].items()))
        fast = [times["solo"][0] for times in rounds]
        return head | {
            "quotas_enforced_by": ready.quotas.means,
            "load_after": machine.load(),
            "disturbance": ready.disturbance(),
            "fractions": fractions(options.global_batch, rounds),
            "gain_over_alone": figures.spread([a / t["averaged"][0] for a, t in zip(fast, rounds, strict=True)]),
            "gain_at_the_limit": figures.spread([sum(t["solo"][0] / s for s in t["solo"]) for t in rounds]),
            "rounds": rounds,
        }


def _milliseconds(seconds: Sequence[float]) -> str:
    return "/".join(f"{each * 1000:.0f}" for each in seconds)


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    words = {
        "apart": "every rank by itself with its part: fixed costs",
        "together": "all at the same time: and running side by side",
        "averaged": "as it is trained: and averaging",
    }
    lines = [f"split {show_split(report['configuration']['split'])}, of the sum of what all devices do alone:"]
    for way, part in report["fractions"].items():
        lines.append(f"{part['median']:>6.0%} ({part['least']:.0%} to {part['greatest']:.0%})  {words[way]}")
    gain, limit = report["gain_over_alone"], report["gain_at_the_limit"]
    lines.append(f"{gain['median']:.2f} times the fast device alone; all of that sum would be {limit['median']:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    run(options, name_of("limit", options), measure, table)


if __name__ == "__main__":
    main()
