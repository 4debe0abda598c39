"""How much faster is `hetero` than plain DDP, than the fast device alone, and than fixed splits, on unequal CPU ranks?

Each rank is a process with one thread, pinned to a core and held to a part of it. All sides live side by side and take
turns within one run, so that whatever else the machine does hits all of them. Everything is a real `Trainer.fit`.

The best fixed split is searched for: a grid from equal to far beyond proportional, then the neighbours of the best of
these, and the finalists compete in every round.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import figures
import machine
from figures import Split, show_split
from quotas import Hierarchy, Quotas, idle_seconds, parse_quotas, place

from lightning_hetero.allocation import proportional

_LEAST = 2  # samples of a rank: BatchNorm needs as many
_FINALISTS = 3
_LOOK = 0.5  # seconds
_DISTURBED = 0.05  # a turn is taken again when others took this part of one of the cores


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quotas", type=parse_quotas, default="100,25", help="percent of a core for each rank, the fastest first")
    add("--global-batch", type=int, default=64, help="samples of a step over all ranks")
    add("--model", choices=("resnet18", "unet"), default="resnet18", help="what is trained")
    add("--size", type=int, default=64, help="pixels of an image's side")
    add("--rounds", type=int, default=5, help="how often each side has its turn")
    add("--steps", type=int, default=10, help="steps that are measured of each turn")
    add("--warm-up", type=int, default=2, help="steps at the start of each turn that are not measured")
    add("--settle", type=int, default=40, help="steps that hetero has to learn in, before the first round")
    add("--search-steps", type=int, default=5, help="steps that are measured of each split while searching")
    add("--splits", type=_splits, default="auto", help="fixed splits to try, such as 48/16,60/4; auto searches")
    add("--patience", type=float, default=120, help="seconds, in all, for letting others finish and repeating turns")
    add("--no-groups", action="store_true", help="competing processes instead of control groups")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    add("--plot", action="store_true", help="draw the report as well")
    options = parser.parse_args(arguments)
    if options.global_batch % len(options.quotas):
        parser.error(f"plain DDP can't split a global batch of {options.global_batch} over {len(options.quotas)} ranks")
    if options.warm_up < 1 or min(options.rounds, options.steps, options.search_steps, options.settle) < 1:
        parser.error("rounds, steps, settling, search and warm-up have to be at least 1")
    for split in options.splits or ():
        if len(split) != len(options.quotas) or sum(split) != options.global_batch:
            parser.error(f"{show_split(split)} is no split of {options.global_batch} over {len(options.quotas)} ranks")
    return options


def _splits(text: str) -> list[Split] | None:
    return None if text == "auto" else [figures.parse_split(part) for part in text.split(",")]


def name_of(options: argparse.Namespace) -> str:
    """The report's name."""
    quotas = "-".join(map(str, options.quotas))
    return f"speed-{options.model}-{options.size}px-{quotas}-b{options.global_batch}"


class Comparison:
    """All sides of one run, and what was measured of them.

    Args:
        options: see `parse`.
        quotas: in force.
        cores: W numbers.
        stack: closes the sides.
    """

    def __init__(self, options: argparse.Namespace, quotas: Quotas, cores: Sequence[int], stack: ExitStack) -> None:
        from sides import Side, Task

        self._options = options
        self._task = Task(options.model, options.size, options.global_batch)
        ranks = range(len(cores))

        def side(name: str, ranks: Sequence[int]) -> Side:
            return stack.enter_context(Side(name, ranks, cores, self._task, quotas))

        self._alone = [side("alone", [rank]) for rank in ranks]
        self._ddp, self._fixed, self._hetero = (side(name, ranks) for name in ("ddp", "fixed", "hetero"))
        self.rounds: dict[str, list[list[float]]] = {}
        self.search: dict[Split, float] = {}
        self.own: dict[Split, list[float]] = {}
        self.hetero_steps: list[dict[str, Any]] = []
        self.solo: list[float] = []
        self.disturbances: list[float] = []
        self._patience = options.patience
        self._cores = cores
        self._competition = max(quotas.taken.values(), default=0.0)
        self.proportional: Split = ()

    def _turn(self, side: Any, steps: int, split: Split | None = None) -> list[float]:
        """Step times of one side's turn, of the quietest of several where others were using the cores."""
        attempts: list[tuple[float, list[float]]] = []
        while not attempts or (min(attempts)[0] > _DISTURBED and self._patience > 0):
            began = time.monotonic()
            self._wait_for_quiet()
            result = side.train(self._options.warm_up + steps, split)
            if attempts:
                self._patience -= time.monotonic() - began
            attempts.append((result["foreign"], figures.steady(result["seconds"], self._options.warm_up)))
            if side is self._hetero:
                self._remember(result)
            elif split is not None:
                self._remember_own(split, result)
        taken, times = min(attempts)
        self.disturbances.append(taken)
        return times

    def _wait_for_quiet(self) -> None:
        """Let others finish, while there is patience left."""
        while self._patience > 0:
            began, idle = time.monotonic(), idle_seconds()
            time.sleep(_LOOK)
            elapsed, now = time.monotonic() - began, idle_seconds()
            least = min(now[core] - idle[core] for core in self._cores)
            if least >= elapsed * (1 - _DISTURBED - self._competition):
                return
            self._patience -= elapsed

    def _remember_own(self, split: Split, result: dict[str, Any]) -> None:
        """What each rank's own work took under a fixed split."""
        steps = [step["own"] for step in result["observed"] if tuple(step["split"]) == split]
        own = [median(column) for column in zip(*steps[self._options.warm_up :], strict=True)]
        self.own[split] = own or self.own.get(split, [])

    def _remember(self, result: dict[str, Any]) -> None:
        """What hetero did, step by step; a step's measurement is exchanged during the next one."""
        first = len(self.hetero_steps)
        steps = [{"step": first + i, "seconds": seconds} for i, seconds in enumerate(result["seconds"])]
        self.hetero_steps += steps
        for observed in result["observed"]:
            self.hetero_steps[observed["step"]] |= observed

    def measure_solo(self) -> None:
        """Each rank by itself, with the whole global batch."""
        for rank, side in enumerate(self._alone):
            self.solo.append(median(self._turn(side, self._options.search_steps)))
            say(f"rank {rank} alone: {self.solo[-1] * 1000:.0f} ms")
        rates = [self._options.global_batch / seconds for seconds in self.solo]
        self._grid = figures.grid(rates, self._options.global_batch, _LEAST)
        self.proportional = proportional(self._options.global_batch, rates, minimum=_LEAST)

    def find_best(self) -> None:
        """Measure fixed splits until the neighbours of the best one are no better."""
        for split in self._options.splits or self._grid:
            self._try(split)
        if self._options.splits is not None:
            return
        samples = max(1, self._options.global_batch // 32)
        while samples:
            best = self._best()
            for split in figures.neighbours(best, samples, _LEAST):
                self._try(split)
            if self._best() == best:
                samples //= 2

    def _best(self) -> Split:
        return min(self.search, key=self.search.__getitem__)

    def _try(self, split: Split) -> None:
        if split not in self.search:
            self.search[split] = median(self._turn(self._fixed, self._options.search_steps, split))
            own = ", ".join(f"{seconds * 1000:.0f}" for seconds in self.own[split])
            say(f"split {show_split(split)}: {self.search[split] * 1000:.0f} ms (own work {own})")

    def let_settle(self) -> None:
        """Give hetero its first steps."""
        self._wait_for_quiet()
        self._remember(self._hetero.train(self._options.settle))  # once only: nobody starts twice
        for step in self.hetero_steps:
            say(tell(step))

    def take_turns(self) -> None:
        """The rounds: every side once in each, in an order that moves on."""
        equal = (self._options.global_batch // len(self._options.quotas),) * len(self._options.quotas)
        finalists = sorted(self.search, key=self.search.__getitem__)[:_FINALISTS]
        splits = list(dict.fromkeys([equal, self.proportional, *finalists]))
        sides = [("ddp", self._ddp, None), ("alone", self._alone[0], None), ("hetero", self._hetero, None)]
        turns = [*sides, *((show_split(split), self._fixed, split) for split in splits)]
        for number in range(self._options.rounds):
            shift = number % len(turns)
            for name, side, split in turns[shift:] + turns[:shift]:
                self.rounds.setdefault(name, []).append(self._turn(side, self._options.steps, split))
            medians = ", ".join(f"{name} {median(rounds[-1]) * 1000:.0f}" for name, rounds in self.rounds.items())
            say(f"round {number + 1} of {self._options.rounds}, ms: {medians}; {self._others()}")

    def _others(self) -> str:
        return f"others took up to {max(self.disturbances):.0%} of a core, {median(self.disturbances):.0%} mostly"

    def report(self) -> dict[str, Any]:
        """All that was found out."""
        fixed = {figures.parse_split(name): rounds for name, rounds in self.rounds.items() if "/" in name}
        best = min(fixed, key=lambda split: figures.middle(fixed[split]))
        sides = {
            "ddp": (min(fixed), self.rounds["ddp"]),
            "alone": (None, self.rounds["alone"]),
            "equal": (min(fixed), fixed[min(fixed)]),
            "proportional": (self.proportional, fixed[self.proportional]),
            "best": (best, fixed[best]),
            "hetero": (tuple(self.hetero_steps[-2]["split"]), self.rounds["hetero"]),
        }
        hetero = self.rounds["hetero"]
        times = self.search | {split: figures.middle(rounds) for split, rounds in fixed.items()}
        plans = figures.changes([(step["step"], tuple(step["split"])) for step in self.hetero_steps if "split" in step])
        return {
            "sides": {
                name: {"split": split, "seconds": figures.middle(rounds), "rounds": [median(r) for r in rounds]}
                for name, (split, rounds) in sides.items()
            },
            "gains": {f"hetero/{name}": figures.gain(sides[name][1], hetero) for name in sides if name != "hetero"},
            "solo_seconds": self.solo,
            "disturbance": {"median": median(self.disturbances), "greatest": max(self.disturbances)},
            "fixed_splits": [
                {"split": split, "seconds": seconds, "own_seconds": self.own[split]}
                for split, seconds in sorted(times.items())
            ],
            "hetero": {
                "plans": plans,
                "settled_after_steps": figures.settled(plans, times),
                "steps": self.hetero_steps,
            },
        }


def tell(step: dict[str, Any]) -> str:
    """A step of hetero in a line."""
    text = f"hetero step {step['step']}: {step['seconds'] * 1000:.0f} ms"
    if "split" in step:
        own = ", ".join(f"{seconds * 1000:.0f}" for seconds in step["own"])
        text += f", split {show_split(step['split'])}, own work {own}"
        if then := step.get("then"):
            predicted = ", ".join(f"{seconds * 1000:.0f}" for seconds in then["predicted"])
            text += f"; then {show_split(then['split'])} from step {then['from']} on ({then['reason']})"
            text += f", predicted {predicted}"
    return text


def say(text: str) -> None:
    """Progress, beside the report."""
    print(text, file=sys.stderr, flush=True)


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = [f"{'side':<14}{'split':>12}{'ms a step':>11}{'samples/s':>11}{'hetero is faster by':>28}"]
    for name, side in report["sides"].items():
        split = show_split(side["split"]) if side["split"] else "-"
        gain = report["gains"].get(f"hetero/{name}")
        words = f"{gain['median']:.2f}x ({gain['least']:.2f} to {gain['greatest']:.2f})" if gain else ""
        rate = report["configuration"]["global_batch"] / side["seconds"]
        lines.append(f"{name:<14}{split:>12}{side['seconds'] * 1000:>11.0f}{rate:>11.1f}{words:>28}")
    settled, others = report["hetero"]["settled_after_steps"], report["disturbance"]
    plans = ", ".join(f"{show_split(split)} from {step}" for step, split in report["hetero"]["plans"])
    lines += [
        "",
        f"quotas: {report['quotas_enforced_by']}",
        f"others took {others['median']:.0%} of a core in the median turn, {others['greatest']:.0%} in the worst",
        f"plans of hetero: {plans}",
        "within 5% of the best fixed split: " + ("not to the end" if settled is None else f"from step {settled} on"),
    ]
    if others["median"] > _DISTURBED:
        lines.append("others were using the cores nearly all the time: this is no result, measure again")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; whatever happens, processes and control groups are gone afterwards."""
    cores = place(options.quotas, sorted(os.sched_getaffinity(0)))
    hierarchy = None if options.no_groups else Hierarchy.find()
    head: dict[str, Any] = {
        "question": "step time of hetero and of what else one could do, on unequal CPU ranks",
        "command": machine.command(),
        "date": time.strftime("%Y-%m-%d"),
        "configuration": {
            key: getattr(options, key)
            for key in ("quotas", "global_batch", "model", "size", "rounds", "steps", "warm_up", "settle")
        },
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "threads_per_rank": 1,
        "allocator": "as it is",
        "load_before": machine.load(),
    }
    with Quotas(options.quotas, cores, hierarchy) as quotas, ExitStack() as stack:
        say(f"quotas {options.quotas} on cores {cores}: {quotas.means}")
        comparison = Comparison(options, quotas, cores, stack)
        comparison.measure_solo()
        comparison.find_best()
        comparison.let_settle()
        comparison.take_turns()
        return head | {"quotas_enforced_by": quotas.means, "load_after": machine.load()} | comparison.report()


def write(report: dict[str, Any], path: Path) -> None:
    """One line a step, so that a change of a report can be read."""
    steps = report["hetero"]["steps"]
    short = report | {"hetero": report["hetero"] | {"steps": "STEPS"}}
    lines = ",\n".join("      " + json.dumps(_rounded(step)) for step in steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(short), indent=2).replace('"STEPS"', f"[\n{lines}\n    ]") + "\n")


def _rounded(value: Any) -> Any:
    """Microseconds are enough."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # also before torch is there
    signal.signal(signal.SIGTERM, _stop)
    try:
        report = measure(options)
    except KeyboardInterrupt:
        say("interrupted; all processes have been ended and control groups removed")
        raise SystemExit(130) from None
    path = options.out / f"{name_of(options)}.json"
    write(report, path)
    print(table(report))
    print(f"\n{path}")
    if options.plot:
        import plot_speed

        print(plot_speed.draw(path))


if __name__ == "__main__":
    main()
