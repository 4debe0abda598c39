"""Scenes, tasks and samplers of TorchGeo, old and new, for the tests of several files."""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, COLUMNS, CHIP, DATES = 3, 4, 16, 4
"""A grid of chips, in chips; pixels along an edge of one; months in which each was taken."""


def task(name: str) -> type[Any]:
    """TorchGeo's task of that name as it is called in 0.10, from the version that is installed."""
    try:
        return getattr(importlib.import_module("torchgeo.tasks"), name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module("torchgeo.trainers"), f"{name}Task")


def has(name: str) -> bool:
    """Whether the installed TorchGeo has that task."""
    try:
        task(name)
    except AttributeError:
        return False
    return True


def tolerate_torchgeo() -> None:
    """Ignore warnings of TorchGeo and of its dependencies."""
    for package in ("torchgeo", "rasterio", "kornia", "pyproj", "geopandas", "shapely"):
        warnings.filterwarnings("ignore", module=package)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
    warnings.filterwarnings("ignore", message="random_sampler @ sequential_sampler may result in")


def make_chips(folder: str) -> None:
    """Files whose bands hold row, column and month, each counted from 1."""
    import rasterio
    from rasterio.transform import from_origin

    tolerate_torchgeo()  # pytest puts the filters back
    rows, columns = np.mgrid[1 : ROWS * CHIP + 1, 1 : COLUMNS * CHIP + 1]
    for row in range(ROWS):
        for column in range(COLUMNS):
            for month in range(1, DATES + 1):
                part = np.s_[row * CHIP : (row + 1) * CHIP, column * CHIP : (column + 1) * CHIP]
                data = np.stack([rows[part], columns[part], np.full((CHIP, CHIP), month)]).astype("float32")
                with rasterio.open(
                    Path(folder) / f"chip_{row}_{column}_2021{month:02}15.tif",
                    "w",
                    driver="GTiff",
                    width=CHIP,
                    height=CHIP,
                    count=3,
                    dtype="float32",
                    crs="EPSG:32612",
                    transform=from_origin(300000 + 10 * CHIP * column, 4100000 - 10 * CHIP * row, 10, 10),
                ) as file:
                    file.write(data)


def place(image: torch.Tensor) -> tuple[float, ...]:
    """Row, column and month of a patch of these chips: the smallest of each, which flips don't change."""
    return tuple(image.movedim(-3, 0).flatten(1).amin(1).tolist())


def _sampler(name: str, dataset: Any, *args: Any, **options: Any) -> Any:
    return getattr(importlib.import_module("torchgeo.samplers"), name)(dataset, *args, **options)


def _both(space: Callable[..., Any], time: Callable[..., Any], dataset: Any) -> Any:
    return space(dataset) @ time(dataset)


def _months(name: str, dataset: Any, **options: Any) -> Any:
    import pandas as pd

    if "days" in options:
        options["delta"] = pd.Timedelta(days=options.pop("days"))
    return _sampler(name, dataset, **options)


_random = partial(_sampler, "RandomPatchSampler", size=8, length=26, generator=3)
_grid = partial(_sampler, "GriddedPatchSampler", size=CHIP)

EVERYWHERE: dict[str, Callable[..., Any]] = {
    "RandomGeoSampler": lambda data: _sampler("RandomGeoSampler", data, 8, length=26),
    "RandomGeoSampler with a generator": lambda data: _sampler(
        "RandomGeoSampler", data, 8, length=26, generator=torch.Generator().manual_seed(1)
    ),
    "PreChippedGeoSampler": lambda data: _sampler("PreChippedGeoSampler", data, shuffle=True),
    "PreChippedGeoSampler in order": lambda data: _sampler("PreChippedGeoSampler", data),
    "GridGeoSampler": lambda data: _sampler("GridGeoSampler", data, CHIP, CHIP),
    "RandomBatchGeoSampler": lambda data: _sampler("RandomBatchGeoSampler", data, 8, 2, length=24),
}
"""Samplers that every version has, from a data set to the sampler."""

NEW: dict[str, Callable[..., Any]] = {
    "RandomPatchSampler": partial(_sampler, "RandomPatchSampler", size=8, length=26),
    "RandomPatchSampler with a generator": _random,
    "GriddedPatchSampler": _grid,
    "RandomTimestampSampler": partial(_months, "RandomTimestampSampler", generator=3),
    "SequentialTimestampSampler": partial(_months, "SequentialTimestampSampler"),
    "RandomTimedeltaSampler": partial(_months, "RandomTimedeltaSampler", days=20, length=9, generator=3),
    "SequentialTimedeltaSampler": partial(_months, "SequentialTimedeltaSampler", days=20),
    "RandomPeriodSampler": partial(_months, "RandomPeriodSampler", freq="M", length=9, generator=3),
    "SequentialPeriodSampler": partial(_months, "SequentialPeriodSampler", freq="D"),
    "random places at random times": partial(_both, _random, partial(_months, "RandomTimestampSampler", generator=4)),
    "random places at all times": partial(
        _both, partial(_random, length=5), partial(_months, "SequentialTimestampSampler")
    ),
    "all places at random times": partial(_both, _grid, partial(_months, "RandomTimestampSampler", generator=4)),
    "all places at all times": partial(_both, _grid, partial(_months, "SequentialTimestampSampler")),
}
"""Samplers that came with 0.10."""

SYSTEMS_ENTROPY = frozenset({"RandomPatchSampler"})
"""Those that draw other patches in every process, as they have no seed."""


def installed() -> list[str]:
    """The samplers that the installed TorchGeo has."""
    new = hasattr(importlib.import_module("torchgeo.samplers"), "RandomPatchSampler")
    return [*EVERYWHERE, *(NEW if new else ())]
