"""TorchGeo's samplers and data modules on a scene that is made here."""

import warnings
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import make_trainer, merged
from tests.trainer.loading import borrows


def make_scene(folder: str) -> None:
    """Two tiles side by side whose pixels encode their position."""
    import rasterio
    from rasterio.transform import from_origin

    warnings.filterwarnings(
        "ignore", category=PendingDeprecationWarning
    )  # of its own code; pytest puts the filter back

    for tile in range(2):
        rows, columns = np.mgrid[0:40, 0:60]
        image = np.stack([rows, columns + 60 * tile]).astype("float32")
        mask = ((rows // 8 + columns // 8) % 3).astype("uint8")[None]
        for kind, data in (("image", image), ("mask", mask)):
            with rasterio.open(
                f"{folder}/{kind}_{tile}.tif",
                "w",
                driver="GTiff",
                width=60,
                height=40,
                count=len(data),
                dtype=data.dtype,
                crs="EPSG:32612",
                transform=from_origin(300000 + 600 * tile, 4100000, 10, 10),
            ) as file:
                file.write(data)


def geo_data(folder: str, sampler: str, batch_size: int) -> Any:
    from torchgeo.datamodules import GeoDataModule
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler, RandomGeoSampler

    class Images(RasterDataset):
        filename_glob = "image_*.tif"

    class Masks(RasterDataset):
        filename_glob = "mask_*.tif"
        is_image = False

    class Data(GeoDataModule):
        mean = torch.tensor(0.0)
        std = torch.tensor(1.0)

        def setup(self, stage: str) -> None:
            self.dataset = Images(folder) & Masks(folder)
            if sampler == "batches":
                self.train_batch_sampler = RandomBatchGeoSampler(self.dataset, 8, batch_size, length=36)
            else:
                self.train_sampler = RandomGeoSampler(self.dataset, 8, length=34)
            self.val_sampler = GridGeoSampler(self.dataset, 8, 8)

    data = Data(Images, batch_size=batch_size, patch_size=8, num_workers=0)
    import kornia.augmentation as K

    data.train_aug = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5), K.RandomVerticalFlip(p=0.5), data_keys=None, keepdim=True
    )
    return data


class Segmentation(pl.LightningModule):
    """Kornia augments after the transfer, dropout draws in the step; remembers where the patches are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Dropout(0.5), torch.nn.Conv2d(4, 3, 1)
        )
        self.seen: list[list[Any]] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append([] if borrows(self) else self.places(batch))
        return torch.nn.functional.cross_entropy(self.net(batch["image"] / 100), batch["mask"].long())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated += self.places(batch)

    @staticmethod
    def places(batch: Any) -> list[Any]:
        """Rows and columns are counted from the corner of the scene; turning a patch over leaves the least."""
        return [tuple(image.amin(dim=(1, 2)).tolist()) for image in batch["image"]]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def tolerate_torchgeo() -> None:
    for package in ("torchgeo", "rasterio", "kornia", "pyproj", "geopandas", "shapely"):
        warnings.filterwarnings("ignore", module=package)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def geo_fit(folder: str, sampler: str, batch_size: int, strategy: Any, **settings: Any) -> tuple[Any, Any]:
    tolerate_torchgeo()
    module = Segmentation()
    torch.manual_seed(100)
    trainer = make_trainer(strategy, torch.distributed.get_world_size(), **settings)
    trainer.fit(module, datamodule=geo_data(folder, sampler, batch_size))
    return module.seen, module.validated


def geo_hetero(folder: str, shares: Any) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    tolerate_torchgeo()
    return {
        sampler: geo_fit(folder, sampler, 6, HeteroStrategy(shares=shares, global_batch=12))
        for sampler in ("patches", "batches")
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("torchgeo")
    folder = str(tmp_path_factory.mktemp("scene"))
    make_scene(folder)
    return folder


@pytest.fixture(scope="module")
def geo_fits(scene: str) -> dict[int, list[dict[str, Any]]]:
    return {
        1: run_ranks(1, geo_hetero, scene, "equal"),
        2: run_ranks(2, geo_hetero, scene, [5, 1]),
    }


@pytest.mark.parametrize("sampler", ["patches", "batches"])
def test_random_patches_depend_on_nothing_that_is_drawn_in_training(geo_fits, sampler):
    """Geographic samplers draw from the global generator, as dropout and augmentation do, here by unequal amounts."""
    one, two = (merged(result[sampler][0] for result in geo_fits[world_size]) for world_size in (1, 2))
    assert one == two
    # The data module drops a last batch that is not full, of 10 patches.
    assert [len(batch) for batch in two] == 2 * ([12, 12] if sampler == "patches" else [12, 12, 12])
    assert two[: len(two) // 2] != two[len(two) // 2 :]
    assert [len(part) for part in geo_fits[2][1][sampler][0]][:2] == [2, 2]


def test_all_patches_of_a_batch_are_of_one_tile(geo_fits):
    """The global batch is made of whole batches of the batch sampler, 6 patches of a tile each."""
    batches = merged(result["batches"][0] for result in geo_fits[2])
    tiles = [[int(column >= 60) for _, column in batch] for batch in batches]
    for step in tiles:
        assert len(set(step[:6])) == 1
        assert len(set(step[6:])) == 1
    assert {tile for step in tiles for tile in step} == {0, 1}


def test_the_validation_grid_is_covered_once(geo_fits):
    for sampler in ("patches", "batches"):
        once = sorted(geo_fits[1][0][sampler][1])
        both = sorted(chain.from_iterable(result[sampler][1] for result in geo_fits[2]))
        assert both == once
        assert len(once) > 2 * 60


def geo_ddp(folder: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    return geo_fit(folder, "batches", 6, "ddp", **settings)


def geo_refused(folder: str) -> Any:
    from lightning_hetero import HeteroStrategy

    return geo_fit(folder, "batches", 6, HeteroStrategy(), use_distributed_sampler=False)


def test_plain_ddp_fails_with_a_geographic_batch_sampler(scene):
    """And the option that its message recommends gives all devices the same patches."""
    errors = fails_on_ranks(2, geo_ddp, scene, {})
    assert all(
        "TypeError:  Lightning can't inject a (distributed) sampler into your batch sampler" in error
        for error in errors.values()
    )
    first, second = run_ranks(2, geo_ddp, scene, {"use_distributed_sampler": False, "max_epochs": 1})
    assert first[0] == second[0]
    errors = fails_on_ranks(2, geo_refused, scene)
    assert all("all ranks draw the same patches; remove use_distributed_sampler=False" in e for e in errors.values())


def geo_overfit(folder: str) -> Any:
    from lightning_hetero import HeteroStrategy

    warnings.filterwarnings("ignore", message="You requested to overfit")
    return geo_fit(folder, "patches", 6, HeteroStrategy(), overfit_batches=2)


def test_overfitting_on_geographic_data_is_refused(scene):
    errors = fails_on_ranks(2, geo_overfit, scene)
    assert all("overfit_batches replaces the geographic sampler by plain numbers" in e for e in errors.values())


class Places(BasePredictionWriter):
    """What a writer receives: the positions of the patches, and what was predicted there."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[tuple[str, Any]] = []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        self.seen += zip(map(str, batch_indices), prediction, strict=True)


class Corner(pl.LightningModule):
    """Predicts where a patch is."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return Segmentation.places(batch)


def places_predicted(folder: str, strategy: Any, devices: int) -> list[tuple[str, Any]]:
    from torch.utils.data import DataLoader
    from torchgeo.datasets import stack_samples

    tolerate_torchgeo()
    data = geo_data(folder, "patches", 4)
    data.setup("fit")
    loader = DataLoader(data.dataset, batch_size=4, sampler=data.val_sampler, collate_fn=stack_samples)
    writer = Places()
    make_trainer(strategy, devices, callbacks=[writer]).predict(Corner(), loader, return_predictions=False)
    return writer.seen


def places_on_ranks(folder: str) -> list[tuple[str, Any]]:
    from lightning_hetero import HeteroStrategy

    return places_predicted(folder, HeteroStrategy(shares=[3, 1]), 2)


def test_a_writer_receives_each_position_once_with_its_prediction(scene):
    """All ranks together receive what one process does; each receives some of it."""
    alone = places_predicted(scene, "auto", 1)
    first, second = run_ranks(2, places_on_ranks, scene)
    assert len(first) > len(second) > 0
    assert sorted(first + second) == sorted(alone)
    assert len({place for place, _ in alone}) == len(alone)
