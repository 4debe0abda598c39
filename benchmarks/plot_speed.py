"""Draws reports of `speed.py`: python benchmarks/plot_speed.py benchmarks/results/speed-*.json."""

import argparse
import json
from pathlib import Path
from typing import Any

from configurations import MODELS
from figures import show_split

_NAMES = {
    "ddp": "plain DDP\nequal split",
    "alone": "fast device\nalone",
    "proportional": "in proportion\nto solo speed",
    "best": "best fixed split\nby search",
    "hetero": "hetero\nfound by itself",
}
QUIET, OURS, TEXT, FAINT = "#b8c0cc", "#d1495b", "#222222", "#667080"


def draw(path: Path) -> Path:
    """One bar a side, with how far the rounds lay apart; returns the picture's path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    report = json.loads(path.read_text())
    configuration = report["configuration"]
    batch = configuration["global_batch"]
    with mpl.rc_context({"font.size": 10, "font.family": "sans-serif", "text.color": TEXT}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        top = 0.0
        for place, name in enumerate(_NAMES):
            side = report["sides"][name]
            rate = batch / side["seconds"]
            rounds = [batch / seconds for seconds in side["rounds"]]
            below, above = max(0.0, rate - min(rounds)), max(0.0, max(rounds) - rate)
            axes.bar(place, rate, width=0.68, color=OURS if name == "hetero" else QUIET)
            axes.errorbar(place, rate, yerr=[[below], [above]], color=TEXT, linewidth=0.9, capsize=2.5)
            _label(axes, place, rate + above, f"{rate:.0f}", side["split"], "white" if name == "hetero" else TEXT)
            top = max(top, rate + above)
        axes.set_ylim(0, top * 1.22)
        axes.set_xlim(-0.5, len(_NAMES) - 0.5)
        axes.set_xticks(range(len(_NAMES)), list(_NAMES.values()))
        axes.tick_params(length=0, labelcolor=TEXT)
        axes.set_ylabel("images per second")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.yaxis.grid(visible=True, color="#e6e9ee", linewidth=0.8)
        axes.set_axisbelow(True)
        gain = report["gains"]["hetero/ddp"]["median"]
        *first, last = configuration["quotas"]
        quotas = f"{', '.join(f'{quota}%' for quota in first)} and {last}%"
        axes.set_title(f"{gain:.1f} times plain DDP on unequal devices", loc="left", weight="bold", size=13, pad=22)
        axes.annotate(
            f"{MODELS[configuration['model']]}, {configuration['size']}×{configuration['size']} pixels, "
            f"global batch {batch}, CPU ranks at {quotas} of a core",
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


def _label(axes: Any, place: float, height: float, rate: str, split: list[int] | None, color: str) -> None:
    """The rate above a bar, and the split in it."""
    above = {"textcoords": "offset points", "ha": "center"}
    axes.annotate(rate, (place, height), (0, 4), weight="bold", size=12, **above)
    if split:
        axes.annotate(show_split(split), (place, 0), (0, 6), color=color, **above)


def main() -> None:
    """Draw all the reports that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files of speed.py")
    for path in parser.parse_args().reports:
        print(draw(path))


if __name__ == "__main__":
    main()
