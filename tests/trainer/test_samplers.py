"""All of TorchGeo's samplers, through its data modules: the same global batches on any devices, with any shares."""

import contextlib
from collections import Counter
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import make_trainer, merged, parameters_of, relative_error
from tests.trainer.geography import (
    CHIP,
    COLUMNS,
    DATES,
    EVERYWHERE,
    NEW,
    ROWS,
    SYSTEMS_ENTROPY,
    installed,
    make_chips,
    place,
    task,
    tolerate_torchgeo,
)
from tests.trainer.test_loss_count import Scenes

GLOBAL_BATCH = 4
CHIPS = ROWS * COLUMNS * DATES

# The samples of an epoch; global batches that are not full are dropped by TorchGeo's data module.
SIZES = {
    "PreChippedGeoSampler": CHIPS,
    "PreChippedGeoSampler in order": CHIPS,
    "GridGeoSampler": CHIPS,
    "RandomBatchGeoSampler": 24,
    "GriddedPatchSampler": ROWS * COLUMNS,
    "RandomTimestampSampler": DATES,
    "SequentialTimestampSampler": DATES,
    "RandomTimedeltaSampler": 9,
    "SequentialTimedeltaSampler": None,  # as many windows as meet a picture
    "RandomPeriodSampler": 9,
    "SequentialPeriodSampler": None,
    "random places at all times": 5 * DATES,
    "all places at random times": CHIPS,
    "all places at all times": CHIPS,
}


def data_module(folder: str, name: str) -> Any:
    from kornia import augmentation as K
    from torchgeo.datamodules import GeoDataModule
    from torchgeo.datasets import RasterDataset

    class Chips(RasterDataset):
        filename_glob = "chip_*.tif"
        filename_regex = r"chip_\d_\d_(?P<date>\d{8})"

    class Data(GeoDataModule):
        mean = torch.tensor(0.0)
        std = torch.tensor(1.0)

        def setup(self, stage: str) -> None:
            self.train_dataset = Chips(folder)
            sampler = (EVERYWHERE | NEW)[name](self.train_dataset)
            if name == "RandomBatchGeoSampler":
                self.train_batch_sampler = sampler
            else:
                self.train_sampler = sampler

    data = Data(Chips, batch_size=2, num_workers=0)
    data.train_aug = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5), K.RandomVerticalFlip(p=0.5), data_keys=None, keepdim=True
    )
    return data


class Places(pl.LightningModule):
    """Remembers where and when the patches are that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list[list[Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append([place(image) for image in batch["image"]])
        torch.rand(1 + 3 * self.global_rank)
        return (self.scale * batch["image"].mean()).square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """There has to be one, since the data module has a loader for it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def draw_all(folder: str, names: list[str], shares: Any) -> dict[str, Any]:
    tolerate_torchgeo()
    seen = {}
    for name in names:
        module = Places()
        torch.manual_seed(100 + torch.distributed.get_rank())
        strategy = HeteroStrategy(shares=shares, global_batch=GLOBAL_BATCH)
        trainer = make_trainer(strategy, torch.distributed.get_world_size(), limit_val_batches=0)
        entropy = name in SYSTEMS_ENTROPY and trainer.world_size > 1 and trainer.is_global_zero
        with (
            pytest.warns(UserWarning, match=f"{name} draws other indices on every rank.*give it a generator=")
            if entropy
            else contextlib.nullcontext()
        ):
            trainer.fit(module, datamodule=data_module(folder, name))
        seen[name] = module.seen
    return seen


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("chips"))
    make_chips(folder)
    names = installed()
    return {
        "one process": run_ranks(1, draw_all, folder, names, "equal"),
        "3:1": run_ranks(2, draw_all, folder, names, [3, 1]),
        "1:1:2": run_ranks(3, draw_all, folder, names, [1, 1, 2]),
    }


@pytest.fixture(params=[*EVERYWHERE, *NEW])
def name(request: pytest.FixtureRequest) -> str:
    if request.param not in installed():
        pytest.skip("the installed TorchGeo does not have this sampler")
    return request.param


def together(drawn: Any, job: str, name: str) -> list[Any]:
    return merged(result[name] for result in drawn[job])


def test_global_batches_are_the_same_on_any_devices(drawn, name):
    """Global batches of two epochs, in their order, though ranks draw unequally from the global generator."""
    if name in SYSTEMS_ENTROPY:
        pytest.skip("has no seed, so no two runs are alike")
    one = together(drawn, "one process", name)
    assert together(drawn, "3:1", name) == one
    assert together(drawn, "1:1:2", name) == one


@pytest.mark.parametrize("job", ["3:1", "1:1:2"])
def test_all_ranks_together_draw_the_sampler_once(drawn, name, job):
    """Each rank has its share, nothing is drawn by two of them, and the epoch is as long as the sampler."""
    batches = together(drawn, job, name)
    shares = {"3:1": [3, 1], "1:1:2": [1, 1, 2]}[job]
    for rank, result in enumerate(drawn[job]):
        assert {len(part) for part in result[name]} == {shares[rank]}
    epochs = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    size = SIZES.get(name, 26)
    for epoch in epochs:
        assert epoch
        assert size is None or len(epoch) == size // GLOBAL_BATCH
        samples = list(chain.from_iterable(epoch))
        if name in {"GridGeoSampler", "all places at all times"} or name.startswith("PreChipped"):
            assert len(set(samples)) == CHIPS
            assert {row for row, _, _ in samples} == {1.0, 1.0 + CHIP, 1.0 + 2 * CHIP}
        elif "Time" not in name and "Period" not in name and "times" not in name:
            # Random patches meet by chance only; a rank that drew by itself would double all of them.
            assert max(Counter(samples).values()) <= 2
            assert len(set(samples)) >= 0.8 * len(samples)


def test_random_epochs_differ(drawn, name):
    """A new epoch is a new draw."""
    batches = together(drawn, "3:1", name)
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    ordered = name.startswith(("Grid", "Sequential")) or name.endswith(("in order", "all places at all times"))
    assert (first == second) is ordered
    if name.endswith("in order"):  # that of the files, which plain DDP would shuffle
        assert list(chain.from_iterable(first)) == sorted(chain.from_iterable(first))


def test_batches_of_one_tile_stay_one_tile(drawn):
    """Two patches of a chip each make a unit; a global batch is made of two units, before it is split."""
    for job in ("3:1", "1:1:2"):
        units = [
            [(int(row - 1) // CHIP, int(column - 1) // CHIP, month) for row, column, month in batch[i : i + 2]]
            for batch in together(drawn, job, "RandomBatchGeoSampler")
            for i in (0, 2)
        ]
        assert all(len(set(unit)) == 1 for unit in units)
        assert len({unit[0] for unit in units}) > 6


# ---- data modules without geography, and an augmentation that makes more samples ----


class Split(Scenes):
    """As TorchGeo's data modules make their data sets: by the split."""

    def __init__(self, split: str = "train") -> None:
        super().__init__({"train": 26, "val": 7, "test": 5}[split])


def slide_mix(gamma: int) -> Any:
    """SatSlideMix that moves nothing, so that only the number of samples changes."""
    from kornia import augmentation as K
    from torchgeo.transforms import SatSlideMix

    return K.AugmentationSequential(SatSlideMix(gamma=gamma, beta=(0.0, 0.0), p=1.0), data_keys=None, keepdim=True)


def fit_mixed(gamma: int, shares: Any) -> Any:
    from torchgeo.datamodules import NonGeoDataModule

    tolerate_torchgeo()

    class Data(NonGeoDataModule):
        mean = torch.tensor(0.0)
        std = torch.tensor(1.0)

    class Counting(task("SemanticSegmentation")):
        sizes: list[int] = []  # noqa: RUF012 - one fit only

        def forward(self, x: Any) -> Any:
            if self.training:
                self.sizes.append(len(x))
            return super().forward(x)

    torch.manual_seed(1)
    module = Counting(model="fcn", in_channels=3, num_filters=4, num_classes=4, ignore_index=0, lr=0.01).double()
    data = Data(Split, batch_size=4)
    data.train_aug = slide_mix(gamma)
    data.aug = torch.nn.Identity()
    torch.manual_seed(100)
    world_size = torch.distributed.get_world_size()
    trainer = make_trainer(HeteroStrategy(shares=shares, global_batch=8), world_size)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return parameters_of(module), module.sizes


def fit_mixes(gammas: list[int], shares: Any) -> list[Any]:
    return [fit_mixed(gamma, shares) for gamma in gammas]


def test_an_augmentation_that_makes_more_samples():
    """SatSlideMix doubles the samples of each batch, and the gradient stays exact."""
    ((plain, _),) = run_ranks(1, fit_mixes, [1], "equal")[0]
    for rank, results in enumerate(run_ranks(2, fit_mixes, [1, 2], [3, 1])):
        for gamma, (parameters, sizes) in zip((1, 2), results, strict=True):
            assert relative_error(parameters, plain) <= 1e-9
            assert set(sizes) == {gamma * (6, 2)[rank]}
