"""Real land-cover data: what unequal ranks have trained, they evaluate with the same counts as one process."""

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torchgeo import samplers
from torchgeo.datamodules import UCMercedDataModule
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask
from torchmetrics.classification import MulticlassConfusionMatrix

from tests.ranks import run_ranks
from tests.trainer.fits import make_trainer
from tests.trainer.loading import quiet

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


def examples() -> Any:
    """The data modules beside the configurations in the docs."""
    spec = importlib.util.spec_from_file_location("land_cover", ROOT / "docs" / "examples" / "land_cover.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counting:
    """Counts what is predicted, beside a task's own metrics."""

    def on_validation_epoch_start(self) -> None:
        if not hasattr(self, "confusion"):
            self.confusion = MulticlassConfusionMatrix(self.classes).to(self.device)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        target = batch["label"] if "label" in batch else batch["mask"]
        predicted = self(batch["image"]).argmax(dim=1)
        known = target != 0 if "mask" in batch else torch.ones_like(target, dtype=torch.bool)
        self.confusion.update(predicted[known], target[known])
        return super().validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self.counts = self.confusion.compute().tolist()
        self.confusion.reset()


class Classification(Counting, ClassificationTask):
    classes = 21

    def __init__(self) -> None:
        super().__init__(model="resnet18", in_channels=3, num_classes=21, lr=1e-3)


class Segmentation(Counting, SemanticSegmentationTask):
    classes = 9

    def __init__(self, channels: int, **options: Any) -> None:
        options = {"num_classes": 9, "loss": "ce", "ignore_index": 0, "lr": 1e-3} | options
        super().__init__(in_channels=channels, **options)


def uc_merced() -> tuple[Any, Any]:
    """A ResNet-18 from scratch at 64 x 64 pixels."""
    import kornia.augmentation as K

    data = UCMercedDataModule(root=str(SHARED / "ucmerced"), batch_size=16)
    data.aug = K.AugmentationSequential(K.Resize((64, 64)), data_keys=None, keepdim=True)
    return Classification(), data


def landsat() -> tuple[Any, Any]:
    """A U-Net, and batches that come from one tile each."""
    module = examples()

    class OneTile(module.LandsatNLCD):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            if stage == "fit" and hasattr(samplers, "RandomBatchGeoSampler"):
                whole = samplers.RandomBatchGeoSampler(self.dataset, 64, self.batch_size, 64)
                self.train_batch_sampler, self.train_sampler = whole, None

    data = OneTile(str(SHARED / "zion_landsat_nlcd"), batch_size=8, length=64)
    return Segmentation(4, model="unet", backbone="resnet18"), data


def sentinel2() -> tuple[Any, Any]:
    """13 bands, 69% unlabelled."""
    data = examples().Sentinel2OSM(str(SHARED / "s2_osm"), batch_size=8, length=64)
    return Segmentation(13, model="fcn", num_filters=16), data


CASES = {"ucmerced": uc_merced, "zion_landsat_nlcd": landsat, "s2_osm": sentinel2}


def _quiet() -> None:
    quiet()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Kornia and GDAL's Python side
    warnings.filterwarnings("ignore", category=PendingDeprecationWarning)


def _values(trainer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def trained(name: str, folder: str) -> dict[str, Any]:
    """Fit on unequal ranks, save, and validate."""
    from lightning_hetero import HeteroStrategy

    _quiet()
    module, data = CASES[name]()
    trainer = make_trainer(
        HeteroStrategy(shares=[3, 1]),
        2,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=6,
        sync_batchnorm=True,
    )
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer.fit(module, data)
    moved = any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    trainer.save_checkpoint(f"{folder}/trained.ckpt")
    trainer.validate(module, data, verbose=False)
    return {"counts": module.counts, "values": _values(trainer), "moved": moved}


def evaluated(name: str, folder: str) -> dict[str, Any]:
    """Validate the same checkpoint in one plain process."""
    _quiet()
    module, data = CASES[name]()
    trainer = make_trainer("auto", 1, limit_val_batches=12)  # a step of two ranks takes two batches
    trainer.validate(module, data, ckpt_path=f"{folder}/trained.ckpt", verbose=False)
    return {"counts": module.counts, "values": _values(trainer)}


@pytest.mark.parametrize("name", CASES)
def test_the_same_checkpoint_has_the_same_counts(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not beside the repository, in ../shared/data")
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(2, trained, name, folder)
        (one,) = run_ranks(1, evaluated, name, folder)
    assert sum(map(sum, one["counts"])) > 50
    for rank in ranks:
        assert rank["moved"]
        assert rank["counts"] == one["counts"], "to the last digit"
        for key, value in one["values"].items():
            # A batch is cut between the ranks, and the mean over its labelled pixels is not that of its parts' means.
            cut = key == "val_loss" and name != "ucmerced"
            assert rank["values"][key] == pytest.approx(value, rel=0.05 if cut else 1e-5, nan_ok=True), key
    assert ranks[0]["values"] == pytest.approx(ranks[1]["values"], rel=0, abs=0, nan_ok=True)
