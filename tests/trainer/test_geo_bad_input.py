"""Geographic data that can't be trained on ends the run with a sentence on every rank; nothing to learn is no error."""

import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Recipe, hetero_fit, keep_counts_on_device, make_trainer, plain_fit, relative_error
from tests.trainer.geography import EVERYWHERE, NEW, installed, make_chips, tolerate_torchgeo
from tests.trainer.modules import Pairs
from tests.trainer.test_loss_count import Scenes, segmentation
from tests.trainer.test_samplers import Places, data_module


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("chips"))
    make_chips(folder)
    return folder


def fit_with(folder: str, name: str, batch_size: int, options: dict[str, Any]) -> None:
    """With a sampler that is made with other options than those of its name."""
    tolerate_torchgeo()
    samplers = EVERYWHERE if name in EVERYWHERE else NEW
    samplers[name] = partial(from_samplers, name, options)
    data = data_module(folder, name)
    data.batch_size = batch_size
    trainer = make_trainer(HeteroStrategy(), torch.distributed.get_world_size(), limit_val_batches=0)
    trainer.fit(Places(), datamodule=data)


def from_samplers(name: str, options: dict[str, Any], dataset: Any) -> Any:
    import torchgeo.samplers

    return getattr(torchgeo.samplers, name)(dataset, **options)


@pytest.mark.parametrize(
    ("name", "batch_size", "options", "sentence"),
    [
        (
            "RandomGeoSampler",
            6,
            {"size": 8, "length": 11},
            r"no batches: RandomGeoSampler drew too few samples for a global batch of 12 with drop_last: let it draw",
        ),
        (
            "RandomPatchSampler",
            6,
            {"size": 8, "length": 11, "generator": 1},
            r"no batches: RandomPatchSampler drew too few samples for a global batch of 12 with drop_last: let it draw",
        ),
        ("RandomBatchGeoSampler", 2, {"size": 8, "batch_size": 12, "length": 11}, r"train_batch_sampler has length 0"),
        (
            "RandomGeoSampler",
            2,
            {"size": 24, "length": 40},
            r"no tile is as large as the patches of RandomGeoSampler, 240 × 240 in units of the data set's CRS",
        ),
        (
            "RandomBatchGeoSampler",
            2,
            {"size": (8, 24), "batch_size": 2, "length": 40},
            r"no tile is as large as the patches of RandomBatchGeoSampler, 80 × 240 in units of",
        ),
        ("RandomGeoSampler", 2, {"size": 24}, r"train_sampler has length 0"),
        (
            "RandomPatchSampler",
            2,
            {"size": 72, "length": 40, "generator": 1},
            r"no tile is as large as the patches of RandomPatchSampler, 720 × 720 in units of",
        ),
    ],
)
def test_nothing_to_draw(chips: str, name: str, batch_size: int, options: dict[str, Any], sentence: str) -> None:
    """Samplers that are shorter than a global batch, and patches that are larger than all tiles."""
    if not any(each.startswith(name) for each in installed()):
        pytest.skip("the installed TorchGeo does not have this sampler")
    errors = fails_on_ranks(2, fit_with, chips, name, batch_size, options)
    assert set(errors) == {0, 1}
    for text in errors.values():
        assert re.search(sentence, text.splitlines()[-1]), text


# ---- a global batch of ignored pixels only ----


class Unlabelled(Scenes):
    """Nothing is labelled in the second and third global batch of 8; the fourth has a rank without labels."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.mask[8:24] = 0
        self.mask[24:31] = 0


def unlabelled(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Unlabelled(32), batch_size=batch_size)


UNLABELLED = Recipe(module=partial(segmentation, ignore_index=0), loader=unlabelled, batch_size=4)


def fit_unlabelled() -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = hetero_fit(UNLABELLED, {"shares": [3, 1]})
    said = [str(warning.message) for warning in caught if "counts on any rank" in str(warning.message)]
    return result["parameters"], result["metrics"]["train_loss"], said


def fit_unlabelled_as_on_cuda() -> Any:
    """The host does not know the counts."""
    keep_counts_on_device()
    return fit_unlabelled()


@pytest.mark.parametrize(
    ("fit", "where"),
    [(fit_unlabelled, r"nothing in global batch 1 counts"), (fit_unlabelled_as_on_cuda, r"nothing in a global batch")],
)
def test_a_global_batch_without_labels_teaches_nothing(fit: Any, where: str) -> None:
    """Its gradient is zero, as in one process; the logged loss is not lost; rank 0 says so, once in two epochs."""
    plain = plain_fit(UNLABELLED, 8)["parameters"]
    results = run_ranks(2, fit)
    for parameters, loss, _ in results:
        assert torch.isfinite(parameters).all()
        assert relative_error(parameters, plain) <= 1e-9
        assert loss == loss  # noqa: PLR0124 - not NaN
    assert [len(said) for _, _, said in results] == [1, 0]
    assert re.search(where, results[0][2][0])


# ---- dictionaries of unequal lengths ----


class Ragged(Scenes):
    """One sample is smaller than the others, as a patch at the edge of a tile may be."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "image": sample["image"][..., :5]} if index == 7 else sample


def ragged(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Ragged(16), batch_size=batch_size)


def test_samples_of_unequal_sizes_are_named_on_all_ranks() -> None:
    """The rank that got the odd one says what torch says, the other one whose fault it was."""
    errors = fails_on_ranks(2, hetero_fit, Recipe(module=segmentation, loader=ragged, batch_size=4), {})
    assert re.search(r"equal size", errors[1].splitlines()[-1]), errors[1]
    assert re.search(r"rank 1 \(cpu\) failed first: \w+Error: ", errors[0].splitlines()[-1]), errors[0]


def two_loaders(batch_size: int) -> dict[str, DataLoader[Any]]:
    from tests.trainer.fits import Numbers

    return {
        "a": DataLoader(Numbers(48), batch_size=batch_size),
        "b": DataLoader(Numbers(24), batch_size=batch_size),
    }


def fit_pairs() -> Any:
    return hetero_fit(Recipe(module=Pairs, loader=two_loaders, batch_size=6), {"shares": [3, 1]})["parameters"]


def test_a_dictionary_of_loaders_of_unequal_lengths() -> None:
    """The shorter one begins anew, as in one process."""
    plain = plain_fit(Recipe(module=Pairs, loader=two_loaders), 12)["parameters"]
    for parameters in run_ranks(2, fit_pairs):
        assert relative_error(parameters, plain) <= 1e-12
