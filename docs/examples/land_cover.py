"""Data modules for the configurations beside this file: one image and one mask, paired as TorchGeo does it.

The western two thirds train, the rest validates, so that no pixel is in both.
"""

from pathlib import Path
from typing import ClassVar

import torch
from shapely import box
from torchgeo import samplers
from torchgeo.datamodules import GeoDataModule
from torchgeo.datasets import RasterDataset


class Sentinel2(RasterDataset):
    """All 13 bands, as digital numbers."""

    filename_glob = "S2_*.tif"
    filename_regex = r"S2_\w+_(?P<date>\d{8})"


class OpenStreetMap(RasterDataset):
    """Land use; 0 where nothing is known."""

    filename_glob = "osm_*.tif"
    filename_regex = r"osm_\w+_(?P<date>\d{8})"
    is_image = False


class Landsat(RasterDataset):
    """Bands 2 to 5 of Landsat 8, as digital numbers."""

    filename_glob = "LC08_*.tif"
    filename_regex = r"LC08_\d+_(?P<date>\d{8})"


class NLCD(RasterDataset):
    """The National Land Cover Database, generalised to 8 classes; 0 is no data."""

    filename_glob = "nlcd8_*.tif"
    filename_regex = r"nlcd8_(?P<date>\d{8})"
    is_image = False


class Scene(GeoDataModule):
    """An image and its mask, split at two thirds of the width.

    Args:
        root: a folder with the folders `image` and `mask`.
        batch_size: patches in a local batch.
        patch_size: pixels along a patch's side.
        length: random patches in a training epoch.
        num_workers: of each loader.
    """

    image: ClassVar[type[RasterDataset]]
    mask: ClassVar[type[RasterDataset]]

    def __init__(
        self, root: str, batch_size: int = 16, patch_size: int = 64, length: int = 1024, num_workers: int = 0
    ) -> None:
        super().__init__(self.image, batch_size, patch_size, length, num_workers)
        self.root = Path(root)

    def setup(self, stage: str) -> None:
        self.dataset = self.image(self.root / "image") & self.mask(self.root / "mask")
        x, y, _ = self.dataset.bounds
        border = x.start + round((x.stop - x.start) / x.step * 2 / 3) * x.step
        west, east = box(x.start, y.start, border, y.stop), box(border, y.start, x.stop, y.stop)
        if hasattr(samplers, "RandomPatchSampler"):  # torchgeo >= 0.10
            random, grid = samplers.RandomPatchSampler, samplers.GriddedPatchSampler
        else:
            random, grid = samplers.RandomGeoSampler, samplers.GridGeoSampler
        if stage == "fit":
            self.train_sampler = random(self.dataset, size=self.patch_size, length=self.length, roi=west)
        if stage in ("fit", "validate"):
            self.val_sampler = grid(self.dataset, size=self.patch_size, stride=self.patch_size, roi=east)
        if stage == "test":
            self.test_sampler = grid(self.dataset, size=self.patch_size, stride=self.patch_size, roi=east)
        if stage == "predict":
            self.predict_sampler = grid(self.dataset, size=self.patch_size, stride=self.patch_size)


class Sentinel2OSM(Scene):
    """Sentinel-2 with OpenStreetMap's land use; means and deviations are of the training columns."""

    image, mask = Sentinel2, OpenStreetMap
    # fmt: off
    mean = torch.tensor(
        [1816.0, 1465.7, 1185.2, 1140.5, 1303.3, 1623.8, 1794.3, 1728.4, 494.7, 13.1, 1824.6, 1202.3, 1978.4])
    std = torch.tensor(
        [175.4, 217.8, 246.6, 351.7, 391.1, 459.6, 531.2, 542.1, 159.2, 2.6, 844.0, 645.6, 627.1])
    # fmt: on


class LandsatNLCD(Scene):
    """Landsat 8 with the National Land Cover Database; means and deviations are of the training columns."""

    image, mask = Landsat, NLCD
    mean = torch.tensor([9537.4, 9508.4, 9967.4, 15880.0])
    std = torch.tensor([1172.9, 1615.1, 2502.5, 2804.7])
