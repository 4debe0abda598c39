"""Draws reports of `drift.py`: python benchmarks/plot_drift.py benchmarks/results/drift-*.json."""

import argparse
import json
from pathlib import Path

from configurations import MODELS
from figures import LATE, show_split
from plot_speed import FAINT, OURS, TEXT


def draw(path: Path) -> Path:
    """Step time over steps, with the best fixed split of each state; returns the picture's path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    report = json.loads(path.read_text())
    configuration, states, steps = report["configuration"], report["states"], report["steps"]
    with mpl.rc_context({"font.size": 10, "font.family": "sans-serif", "text.color": TEXT}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        seconds = [step["seconds"] for step in steps]
        axes.plot([step["step"] for step in steps], seconds, color=OURS, linewidth=1.2, marker=".", markersize=4)
        top = 1.25 * max(seconds)
        ends = [*(state["first_step"] for state in states[1:]), len(steps)]
        for state, end in zip(states, ends, strict=True):
            first, best = state["first_step"], state["best_seconds"]
            axes.hlines(best, first - 0.5, end - 0.5, color=TEXT, linewidth=1, linestyle="--")
            axes.axvline(first - 0.5, color=FAINT, linewidth=0.8)
            words = f"{state['late_ratio_to_best']:.0%} of its speed after {LATE} steps"
            axes.annotate(
                f"slow rank at {state['quota']}%\nbest split {show_split(state['best'])}\n{words}",
                (first, top),
                (4, -4),
                textcoords="offset points",
                va="top",
                size=9,
                color=FAINT,
            )
        axes.set_ylim(0, top)
        axes.set_xlim(-0.5, len(steps) - 0.5)
        axes.set_xlabel("step")
        axes.set_ylabel("seconds a step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title("hetero follows a device's speed", loc="left", weight="bold", size=13, pad=22)
        size, batch = configuration["size"], configuration["global_batch"]
        axes.annotate(
            f"{MODELS[configuration['model']]}, {size}×{size} pixels, global batch {batch}; dashed: best fixed split",
            (0, 1),
            (0, 7),
            xycoords="axes fraction",
            textcoords="offset points",
            size=9.5,
            color=FAINT,
        )
        picture = path.with_suffix(".png")
        figure.savefig(picture, dpi=160, facecolor="white")
    return picture


def main() -> None:
    """Draw all the reports that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files of drift.py")
    for path in parser.parse_args().reports:
        print(draw(path))


if __name__ == "__main__":
    main()
