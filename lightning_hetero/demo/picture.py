"""Draws `landcover.png`: the scene, its labels, and the prediction."""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_hetero.demo.evaluation import Evaluation
from lightning_hetero.demo.scene import ATTRIBUTION, BANDS, CLASSES, UNLABELLED


def composite(image: NDArray[np.float32], bands: tuple[str, str, str]) -> NDArray[np.float32]:
    """Three bands as red, green and blue, each stretched between its 2nd and its 98th percentile.

    Args:
        image: (bands, rows, columns).
        bands: their names.

    Returns:
        (rows, columns, 3), from 0 to 1.
    """
    chosen = np.stack([image[BANDS.index(band)] for band in bands], axis=-1)
    low, high = np.percentile(chosen, (2, 98), axis=(0, 1))
    stretched: NDArray[np.float32] = np.clip((chosen - low) / (high - low), 0, 1)
    return stretched


def draw(evaluation: Evaluation, steps: int, path: Path) -> None:
    """Write the picture.

    Args:
        evaluation: of the validation columns.
        steps: optimizer steps that the model was trained for.
        path: where the PNG is written.
    """
    figure = Figure(figsize=(12, 7.1), dpi=120)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.09, wspace=0.02)
    figure.text(
        0.5,
        0.95,
        f"Land cover after {steps} steps: {evaluation.accuracy:.0%} of the labelled pixels right "
        f"(always “most frequent class”: {evaluation.majority_accuracy:.0%}), mean IoU {evaluation.mean_iou:.2f}",
        ha="center",
        fontsize=13,
    )
    colors = ListedColormap([land_cover.color for land_cover in CLASSES])
    axes = figure.subplots(1, 3)
    panels = (
        ("Sentinel-2, 2017-02-16 (near infrared, red, green)", composite(evaluation.image, ("B08", "B04", "B03"))),
        ("OpenStreetMap labels", evaluation.labels),
        ("Prediction", evaluation.prediction),
    )
    for axis, (title, pixels) in zip(axes, panels, strict=True):
        axis.imshow(pixels, aspect="equal", cmap=colors, vmin=-0.5, vmax=len(CLASSES) - 0.5, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    known = [c for value, c in enumerate(CLASSES) if value != UNLABELLED] + [CLASSES[UNLABELLED]]
    figure.legend(
        handles=[Patch(facecolor=c.color, edgecolor="#777777", label=c.name) for c in known],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.03),
        ncols=len(CLASSES),
        frameon=False,
    )
    note = f"5 × 8 km that the model was never trained on. {ATTRIBUTION}"
    figure.text(0.5, 0.015, note, ha="center", fontsize=7, color="#444444")
    figure.savefig(path)
