"""Draws what `hetero` gains in all configurations of `speed.py`; see `overview.py --plot`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configurations import name_of
from plot_speed import OURS, QUIET, TEXT

_PANELS = (
    ("ddp", "times plain DDP", QUIET),
    ("alone", "times the fast device alone", QUIET),
    ("best", "times the best fixed split", OURS),
)


def draw(reports: Sequence[Mapping[str, Any]], picture: Path) -> Path:
    """One line for each configuration, one panel for each side; returns the picture's path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "font.family": "sans-serif", "text.color": TEXT}):
        figure = Figure(figsize=(11, 1.6 + 0.42 * len(reports)), layout="constrained")
        panels = figure.subplots(1, len(_PANELS), sharey=True, squeeze=False)[0]
        for axes, (side, title, color) in zip(panels, _PANELS, strict=True):
            gains = [report["gains"][f"hetero/{side}"] for report in reports]
            for place, gain in enumerate(gains):
                middle = gain["median"]
                axes.barh(place, middle, height=0.62, color=color)
                reach = [[max(0.0, middle - gain["least"])], [max(0.0, gain["greatest"] - middle)]]
                axes.errorbar(middle, place, xerr=reach, color=TEXT, linewidth=0.9, capsize=2)
                offset = {"textcoords": "offset points", "va": "center"}
                axes.annotate(f"{middle:.2f}", (gain["greatest"], place), (5, 0), size=9.5, **offset)
            axes.axvline(1, color=TEXT, linewidth=0.8, linestyle="--")
            axes.set_xlim(0, 1.2 * max(1.0, *(gain["greatest"] for gain in gains)))
            axes.set_title(title, loc="left", size=10.5, weight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0, labelcolor=TEXT)
        panels[0].set_yticks(range(len(reports)), [name_of(report) for report in reports])
        panels[0].invert_yaxis()
        figure.suptitle("How many times as fast hetero trains", x=0.01, ha="left", weight="bold", size=13)
        figure.savefig(picture, dpi=160, facecolor="white")
    return picture
