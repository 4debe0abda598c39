"""How much faster is `hetero` than plain DDP, than the fast device alone, and than fixed splits, on unequal CPU ranks?

Each rank is a process with one thread, pinned to a core and held to a part of it. All sides live side by side and take
turns within one run, so that whatever else the machine does hits all of them. Everything is a real `Trainer.fit`.

The best fixed split is searched for: a grid from equal to far beyond proportional, then the neighbors of the best of
these. The fastest take turns in the first rounds, and the winner of those is measured in the others. Since it comes
close to `hetero`, the two then take some more turns by themselves, together with the split of `hetero` as a fixed one.
"""

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import figures
import machine
import reports
from command_line import CONFIGURATION, add_common, check_common, check_splits, name_of, parser_of, run, splits_of
from figures import Split, show_split
from reports import say
from searching import LEAST
from turns import DISTURBED, Stage, stage

_COUNTS = ("rounds", "choosing", "steps", "slow_steps", "settle", "search_steps", "finalists", "pairs")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--rounds", type=int, default=6, help="how often each side has its turn")
    add(
        "--choosing",
        type=int,
        default=2,
        help="the first rounds, that choose the best fixed split and don't count for it",
    )
    add("--finalists", type=int, default=3, help="fixed splits that take part in these")
    add("--pairs", type=int, default=4, help="turns of hetero, the best split and hetero's after the last round")
    add("--steps", type=int, default=10, help="steps that are measured of each turn")
    add("--slow-steps", type=int, default=4, help="the same for plain DDP, and the equal and the proportional split")
    add("--settle", type=int, default=30, help="steps that hetero has to find its split in, before the first round")
    add("--search-steps", type=int, default=6, help="most steps that are measured of each split while searching")
    add("--solo-steps", type=int, default=3, help="steps of each rank by itself, before the search")
    add("--finest", type=int, help="least number of samples that the search moves; None: a 128th of the global batch")
    add("--splits", type=splits_of, default="auto", help="fixed splits to try, such as 48/16,60/4; auto searches")
    add("--plot", action="store_true", help="draw the report as well")
    options = parser.parse_args(arguments)
    check_common(parser, options, (*_COUNTS, "solo_steps"))
    check_splits(parser, options, options.splits or ())
    if options.choosing >= options.rounds:
        parser.error("there have to be more rounds than those that choose")
    return options


class Comparison:
    """All sides of one run, and what was measured of them.

    Args:
        options: see `parse`.
        stage: where they take turns.
    """

    def __init__(self, options: argparse.Namespace, stage: Stage) -> None:
        self._options = options
        self._stage = stage
        self._world_size = len(options.quotas)
        self._ddp, self._fixed, self._hetero = (stage.side(kind) for kind in ("ddp", "fixed", "hetero"))
        self._alone = stage.side("alone", [0])
        self._search = stage.search(self._fixed, options.search_steps)
        self._rounds: dict[str | Split, list[list[float]]] = {}
        self._pairs: dict[str, list[list[float]]] = {"hetero": [], "best": [], "plan": []}
        self._plan: Split = ()
        self._best: Split = ()
        self._solo: list[float] = []
        self._equal: Split = (options.global_batch // self._world_size,) * self._world_size
        self._proportional: Split = ()

    def measure_solo(self) -> None:
        """Each rank by itself, with the whole global batch."""
        from lightning_hetero.planning.allocation import proportional

        for rank in range(self._world_size):
            side = self._alone if rank == 0 else self._stage.side("alone", [rank])
            self._solo.append(median(self._stage.take(side, self._options.solo_steps, warm_up=1)))
            say(f"rank {rank} alone: {self._solo[-1] * 1000:.0f} ms")
            if rank > 0:
                side.close()
        self._proportional = proportional(self._options.global_batch, self._rates(), minimum=LEAST)

    def _rates(self) -> list[float]:
        return [self._options.global_batch / seconds for seconds in self._solo]

    def find_best(self) -> None:
        """Measure fixed splits until the neighbors of the best one are no better."""
        if self._options.splits is None:
            self._search.run(self._rates(), self._options.global_batch, self._options.finest)
        for split in self._options.splits or ():
            self._search.look_at(split)

    def let_settle(self) -> None:
        """Give hetero its first steps; what it comes to is a candidate for the best fixed split, as any other."""
        self._stage.once(self._hetero, self._options.settle)
        for step in self._hetero.steps:
            say(line_of(step))
        if self._options.splits is None:
            self._search.look_at(self._hetero.steps[-1]["split"])
            self._search.polish(self._options.global_batch, self._options.finest)

    def take_turns(self) -> None:
        """The rounds: every side once in each, in an order that moves on."""
        options = self._options
        finalists = self._search.finalists(options.finalists)
        for number in range(options.rounds):
            if number == options.choosing:
                self._best = figures.best_of({split: self._rounds[split] for split in finalists})
                finalists = [self._best]
            turns: dict[str | Split, tuple[Any, int, Split | None]] = {
                "ddp": (self._ddp, options.slow_steps, None),
                "alone": (self._alone, options.steps, None),
                "hetero": (self._hetero, options.steps, None),
                self._equal: (self._fixed, options.slow_steps, self._equal),
                self._proportional: (self._fixed, options.slow_steps, self._proportional),
            }
            turns |= {split: (self._fixed, options.steps, split) for split in finalists}
            names = list(turns)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                self._rounds.setdefault(name, []).append(self._stage.take(*turns[name]))
            medians = ", ".join(
                f"{name if isinstance(name, str) else show_split(name)} {median(self._rounds[name][-1]) * 1000:.0f}"
                for name in names
            )
            others = self._stage.disturbance()
            say(f"round {number + 1} of {options.rounds}, ms: {medians}")
            say(f"others took up to {others['greatest']:.0%} of a core, {others['median']:.0%} mostly")

    def compare_with_best(self) -> None:
        """Turns of hetero, the best fixed split and the one that hetero has come to, each of them first in its turn.

        Processes that do the same may differ by several percent for as long as they live. The last two run in the same
        ones, so they show what the choice of the split makes.
        """
        self._plan = tuple(self._hetero.steps[-1]["split"])
        turns = {"hetero": (self._hetero, None), "best": (self._fixed, self._best), "plan": (self._fixed, self._plan)}
        names = list(turns)
        for number in range(self._options.pairs):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                side, split = turns[name]
                self._pairs[name].append(self._stage.take(side, self._options.steps, split))
            say(", ".join(f"{name} {median(times[-1]) * 1000:.0f} ms" for name, times in self._pairs.items()))

    def report(self) -> dict[str, Any]:
        """All that was found out."""
        hetero = self._rounds["hetero"]
        best = self._rounds[self._best][self._options.choosing :] + self._pairs["best"]
        sides: dict[str, tuple[Split | None, list[list[float]]]] = {
            "ddp": (self._equal, self._rounds["ddp"]),
            "alone": (None, self._rounds["alone"]),
            "equal": (self._equal, self._rounds[self._equal]),
            "proportional": (self._proportional, self._rounds[self._proportional]),
            "best": (self._best, best),
            "hetero": (self._hetero.steps[-1]["split"], hetero),
        }
        measured = {split: figures.middle(rounds) for split, rounds in self._rounds.items() if isinstance(split, tuple)}
        times = self._search.seconds | measured
        plans = figures.changes([(step["step"], step["split"]) for step in self._hetero.steps])
        # What all devices would do together if nothing were lost, in units of the fast one; that one is in every round.
        devices = sum(self._solo[0] / seconds for seconds in self._solo)
        return {
            "sides": {
                name: {"split": split, "seconds": figures.middle(rounds), "rounds": [median(r) for r in rounds]}
                for name, (split, rounds) in sides.items()
            },
            "gains": {
                f"hetero/{name}": figures.gain(rounds, hetero + self._pairs["hetero"] if name == "best" else hetero)
                for name, (_, rounds) in sides.items()
                if name != "hetero"
            },
            "plan": {
                "split": self._plan,
                "best/plan": figures.gain(self._pairs["best"], self._pairs["plan"]),
            },
            "part_of_solo_rates": {
                name: figures.scaled(figures.gain(self._rounds["alone"], rounds), 1 / devices)
                for name, rounds in (("hetero", hetero), ("best", best[: len(hetero) - self._options.choosing]))
            },
            "solo_seconds": self._solo,
            "disturbance": self._stage.disturbance(),
            "fixed_splits": [
                {"split": split, "seconds": seconds, "compute_seconds": figures.compute_times(self._fixed.steps, split)}
                for split, seconds in sorted(times.items())
            ],
            "hetero": {
                "plans": plans,
                "paying": self._hetero.paying,
                "settled_after_steps": figures.settled(plans, times),
                "steps": self._hetero.steps,
            },
        }


def line_of(step: dict[str, Any]) -> str:
    """A step of hetero in a line."""
    text = f"hetero step {step['step']}: {step['seconds'] * 1000:.0f} ms, split {show_split(step['split'])}"
    if "compute" in step:
        compute = ", ".join(f"{seconds * 1000:.0f}" for seconds in step["compute"])
        text += f", compute time {compute}"
        if then := step.get("then"):
            predicted = ", ".join(f"{seconds * 1000:.0f}" for seconds in then["predicted"])
            text += f"; then {show_split(then['split'])} from step {then['from']} on ({then['reason']})"
            text += f", predicted {predicted}"
    return text


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = [f"{'side':<14}{'split':>12}{'ms a step':>11}{'samples/s':>11}{'hetero is faster by':>28}"]
    for name, side in report["sides"].items():
        split = show_split(side["split"]) if side["split"] else "-"
        gain = report["gains"].get(f"hetero/{name}")
        words = f"{gain['median']:.2f}x ({gain['least']:.2f} to {gain['greatest']:.2f})" if gain else ""
        rate = report["configuration"]["global_batch"] / side["seconds"]
        lines.append(f"{name:<14}{split:>12}{side['seconds'] * 1000:>11.0f}{rate:>11.1f}{words:>28}")
    choice, plan = report["plan"]["best/plan"], show_split(report["plan"]["split"])
    spread = f"{choice['median']:.2f}x ({choice['least']:.2f} to {choice['greatest']:.2f})"
    settled, others = report["hetero"]["settled_after_steps"], report["disturbance"]
    plans = ", ".join(f"{show_split(split)} from {step}" for step, split in report["hetero"]["plans"])
    part = {name: f"{values['median']:.0%}" for name, values in report["part_of_solo_rates"].items()}
    lines += [
        "",
        f"in the same processes, hetero's split {plan} is faster than the best one by {spread}",
        f"of the sum of what all devices do alone: hetero {part['hetero']}, best fixed split {part['best']}",
        f"quotas: {report['quotas_enforced_by']}; allocator: {report['configuration']['allocator']}",
        f"others took {others['median']:.0%} of a core in the median turn, {others['greatest']:.0%} in the worst",
        f"plans of hetero: {plans}",
        "within 5% of the best fixed split: " + ("not to the end" if settled is None else f"from step {settled} on"),
    ]
    if paying := report["hetero"].get("paying"):
        lines.append(who_pays(paying))
    if others["median"] > DISTURBED:
        lines.append("others were using the cores nearly all the time: this is no result, measure again")
    return "\n".join(lines)


def who_pays(paying: dict[str, Any]) -> str:
    """What hetero has said of ranks that do not pay."""
    if not paying["not_paying"]:
        return "hetero says that all ranks pay"
    times = f"{paying['predicted_seconds_without'] * 1000:.0f} instead of {paying['predicted_seconds'] * 1000:.0f} ms"
    others = paying["not_paying"]
    ranks = ", ".join(f"rank {each['rank']} (pays from {each['pays_from'] or 'never'})" for each in others)
    return f"hetero says what does not pay: {ranks}; without: {times}"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    head = reports.head(
        "step time of hetero and of what else one could do, on unequal CPU ranks",
        options,
        (*CONFIGURATION, "warm_up", *_COUNTS),
    )
    with stage(options) as ready:
        comparison = Comparison(options, ready)
        comparison.measure_solo()
        comparison.find_best()
        comparison.let_settle()
        comparison.take_turns()
        comparison.compare_with_best()
        head |= {"quotas_enforced_by": ready.quotas.means, "load_after": machine.load()}
        return head | comparison.report()


def main() -> None:
    """Measure, write, show."""
    options = parse()
    path = run(options, name_of("speed", options), measure, table)
    if options.plot:
        import plot_speed

        print(plot_speed.draw(path))


if __name__ == "__main__":
    main()
