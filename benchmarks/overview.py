"""All results in one place: a table in Markdown of every report in `benchmarks/results`.

`--plot` also draws what `hetero` gains in each configuration of `speed.py`.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plot_overview
from command_line import parser_of
from configurations import MODELS, allocator_of, name_of
from figures import show_split

Report = Mapping[str, Any]

QUESTIONS = ("speed", "limit", "settling", "drift", "evaluation", "tax", "cpu", "gpu", "allocation")
"""The reports of one start with its name."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the reports")
    parser.add_argument("--plot", action="store_true", help="draw overview.png there")
    return parser.parse_args(arguments)


def read(folder: Path) -> dict[str, list[Report]]:
    """All reports, by the question that they answer, and those of a question by configuration."""
    found: dict[str, list[Report]] = {}
    for question in QUESTIONS:
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{question}-*.json"))]
        found[question] = sorted(reports, key=_order)
    return found


def _order(report: Report) -> tuple[Any, ...]:
    """Models, sizes, the number of ranks, the most unequal quotas last, and small batches first."""
    configuration = report["configuration"]
    quotas = configuration.get("quotas", [])
    mildest_first = [-quota for quota in quotas]
    model = list(MODELS).index(configuration["model"]) if "model" in configuration else -1
    sizes = configuration.get("size", 0), len(quotas), mildest_first, configuration.get("global_batch", 0)
    return (model, *sizes, allocator_of(report))


def _times(gain: Mapping[str, float] | None) -> str:
    """1.23 (1.20 to 1.25)."""
    return "–" if gain is None else f"{gain['median']:.2f} ({gain['least']:.2f} to {gain['greatest']:.2f})"


def _part(report: Report, side: str) -> str:
    parts = report.get("part_of_solo_rates")
    return "–" if parts is None else f"{parts[side]['median']:.0%}"


def speed_table(reports: Sequence[Report]) -> str:
    """One line for each configuration: what hetero gains over each of the others."""
    sides = ("ddp", "alone", "equal", "proportional", "best")
    titles = [
        "configuration",
        "split of hetero",
        "best fixed split",
        "× plain DDP",
        "× fast device alone",
        "× equal split",
    ]
    titles += ["× proportional split", "× best fixed split", "of Σ solo rates", "best fixed split: of Σ solo rates"]
    titles += ["within 5% of the best from step"]
    rows = []
    for report in reports:
        split = {side: show_split(report["sides"][side]["split"]) for side in ("hetero", "best")}
        gains = [_times(report["gains"].get(f"hetero/{side}")) for side in sides]
        settled = report["hetero"]["settled_after_steps"]
        parts = [_part(report, "hetero"), _part(report, "best")]
        rows.append(
            [name_of(report), split["hetero"], split["best"], *gains, *parts, "–" if settled is None else f"{settled}"]
        )
    return _markdown(titles, rows)


def _limit(report: Report) -> str:
    parts = {way: _times(part) for way, part in report["fractions"].items()}
    text = f"of the sum of solo rates, which is {report['gain_at_the_limit']['median']:.2f} times the fast device, the "
    text += f"split {show_split(report['configuration']['split'])} reaches {parts['apart']} with every rank by itself, "
    return text + f"{parts['together']} with all at the same time, {parts['averaged']} with averaged gradients"


def _settling(report: Report) -> str:
    ratio = report["ratio_to_fixed"]
    steps = report["configuration"]["steps"]
    settled = ", ".join("not to the end" if step is None else f"{step}" for step in report["settled_after_steps"])
    text = f"first {steps} steps, exploration included, at {_times(ratio['first_step_counted'])} of the best fixed "
    text += f"split's speed ({_times(ratio['first_step_left_out'])} without the very first step, "
    fast = ", ".join("never" if step is None else f"{step}" for step in report["as_fast_from_step"])
    text += (
        f"{_times(ratio['fresh_fixed_run'])} of a fresh run of that split); as fast within 5% from step {fast}, at a "
    )
    text += f"split within 5% of the best one from step {settled}"
    if (more := report["plan_changes_while_steady"]) is not None:
        text += f"; {more} changes of plan in {report['configuration']['steady']} more steps"
    return text


def _drift(report: Report) -> str:
    first, *later = report["states"]
    texts = []
    for before, state in zip([first, *later], later, strict=False):
        settled = state["steps_until_settled"]
        when = "not within" if settled is None else f"after {settled} steps within"
        texts.append(f"slow rank from {before['quota']}% to {state['quota']}%: {when} 5% of the best fixed split")
        texts[-1] += f", {state['late_ratio_to_best']:.2f} of its speed from the 20th step on"
    return "; ".join(texts)


def _tax(report: Report) -> str:
    ratios = report["ratios"]
    text = f"step time of hetero {_times(ratios['hetero_over_ddp'])} of DDP's with the same allocator, "
    text += f"peak memory {report['peak_ratio']:.2f} of it"
    if "gain_of_hetero" in ratios:
        text += f"; over DDP as it is: hetero {_times(ratios['gain_of_hetero'])} times as fast, "
        text += f"DDP with the same allocator {_times(ratios['gain_of_allocator'])}"
    return text


def _cpu(report: Report) -> str:
    first, *_ = report["sides"]
    ratios = ", ".join(f"{name}: {_times(ratio)}" for name, ratio in report["ratios"].items())
    return f"step time over that of a rank with one thread ({first}, no loader workers): {ratios}"


def _evaluation(report: Report) -> str:
    sides = report["sides"]
    text = f"an evaluation takes {_times(report['hetero_over_ddp'])} of DDP's time; samples of each rank "
    return text + " beside ".join(show_split(sides[name]["samples_of_ranks"]) for name in ("hetero", "ddp"))


def _gpu(report: Report) -> str:
    cases = []
    for case in report["cases"]:
        who = "one rank" if case["ranks"] == 1 else f"{case['ranks']} ranks on one GPU"
        who += ", one of them beside other work" if case["limited"] else ""
        best = f", {_times(case['gain_over_best'])} of the best fixed split's" if case["limited"] else ""
        cases.append(f"{who}: speed of hetero {_times(case['gain_over_ddp'])} of DDP's{best}")
    return "; ".join(cases)


def _allocation(report: Report) -> str:
    times = report["milliseconds"]
    return f"{times['median']:.1f} ms, at most {times['greatest']:.1f} ms"


_WORDS: dict[str, Callable[[Report], str]] = {
    "limit": _limit,
    "settling": _settling,
    "drift": _drift,
    "evaluation": _evaluation,
    "tax": _tax,
    "cpu": _cpu,
    "gpu": _gpu,
    "allocation": _allocation,
}


def overview(reports: Mapping[str, Sequence[Report]]) -> str:
    """The whole table."""
    rows = [[f"`{name}`", name_of(report), words(report)] for name, words in _WORDS.items() for report in reports[name]]
    parts = []
    if reports["speed"]:
        parts.append(speed_table(reports["speed"]))
    if rows:
        parts.append(_markdown(["benchmark", "configuration", "result"], rows))
    return "\n\n".join(parts) if parts else "there are no reports"


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Show, and draw."""
    options = parse()
    reports = read(options.results)
    print(overview(reports))
    if options.plot and reports["speed"]:
        print(f"\n{plot_overview.draw(reports['speed'], options.results / 'overview.png')}")


if __name__ == "__main__":
    main()
