"""What batches count for: the rules, and that they make the gradient of TorchGeo's tasks exact."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_hetero import cross_entropy_count
from lightning_hetero.step.batch_contents import sample_count
from lightning_hetero.step.loss_count import find_loss_counter
from tests.ranks import run_ranks
from tests.trainer import geography
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, plain_fit, relative_error
from tests.trainer.modules import Classifier

FCN = {"model": "fcn", "in_channels": 3, "num_filters": 4, "lr": 0.01}


def prepared(task: Any, model: nn.Module | None = None) -> Any:
    """In double precision; its scheduler looks at the training loss, since there is no validation."""
    task.monitor = "train_loss"
    if model is not None:
        task.model = model
    return task.double()


def segmentation(**options: Any) -> Any:
    torch.manual_seed(1)
    return prepared(geography.task("SemanticSegmentation")(**FCN, **({"num_classes": 4} | options)))


def pixels() -> Any:
    torch.manual_seed(1)
    return prepared(geography.task("PixelwiseRegression")(**FCN, loss="mse"))


class Linear(nn.Module):
    """A classifier without BatchNorm, for tasks whose own models have it."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, outputs))

    def forward(self, x: Any) -> Any:
        return self.net(x)


def classification(**options: Any) -> Any:
    torch.manual_seed(1)
    task = geography.task("Classification")(model="resnet18", in_channels=3, lr=0.01, **({"num_classes": 4} | options))
    return prepared(task, Linear(4))


def regression() -> Any:
    torch.manual_seed(1)
    task = geography.task("Regression")(model="resnet18", in_channels=3, lr=0.01)
    return prepared(task, Linear(1))


class Scenes(Dataset[Any]):
    """Small images with labels and masks; some masks are all class 0, which some tasks ignore."""

    def __init__(self, size: int, *, target: str = "classes") -> None:
        generator = torch.Generator().manual_seed(5)
        self.image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
        self.mask = torch.randint(4, (size, 8, 8), generator=generator)
        self.mask[::3] = 0
        self.label = torch.randint(4, (size,), generator=generator)
        self.target = target

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask, label = self.mask[index], self.label[index]
        if self.target == "numbers":
            mask, label = mask.double(), label.double()
        if self.target == "binary":
            mask = mask.clamp(max=1)
        if self.target == "several":
            label = torch.nn.functional.one_hot(label, 4)
        return {"image": self.image[index], "mask": mask, "label": label}


def scenes(target: str, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Scenes(29, target=target), batch_size=batch_size)


TASKS: dict[str, tuple[Any, str, str]] = {
    "ce": (segmentation, "classes", "valid targets of SemanticSegmentation"),
    "ce, ignored": (
        partial(segmentation, ignore_index=0),
        "classes",
        "valid targets of SemanticSegmentation",
    ),
    "ce, weights, ignored": (
        partial(segmentation, ignore_index=0, class_weights=torch.tensor([1.0, 4.0, 0.5, 2.0])),
        "classes",
        "valid targets of SemanticSegmentation",
    ),
    "bce": (
        partial(segmentation, task="binary", loss="bce", num_classes=1, num_labels=1),
        "binary",
        "target elements of SemanticSegmentation",
    ),
    "pixelwise regression": (pixels, "numbers", "target elements of PixelwiseRegression"),
    "classification": (classification, "classes", "valid targets of Classification"),
    "classification, weights": (
        partial(classification, class_weights=torch.tensor([1.0, 4.0, 0.5, 2.0])),
        "classes",
        "valid targets of Classification",
    ),
    "several labels": (
        partial(classification, task="multilabel", num_classes=4, num_labels=4, loss="bce"),
        "several",
        "target elements of Classification",
    ),
    "regression": (regression, "numbers", "target elements of Regression"),
}


def recipe(name: str) -> Recipe:
    module, target, _ = TASKS[name]
    return Recipe(module=module, loader=partial(scenes, target), batch_size=4, max_epochs=1)


def fit_tasks(shares: Any) -> list[Any]:
    return [hetero_fit(recipe(name), {"shares": shares})["parameters"] for name in TASKS]


def test_torchgeo_tasks_are_exact() -> None:
    """Unchanged tasks on 3:1 shares end with the parameters of one process, though AdamW divides by the gradient."""
    ranks = run_ranks(2, fit_tasks, [3, 1])
    for number, name in enumerate(TASKS):
        plain = plain_fit(recipe(name), 8)["parameters"]
        for parameters in ranks:
            assert relative_error(parameters[number], plain) <= 1e-9, name


@pytest.mark.parametrize("name", TASKS)
def test_the_rule_of_a_known_task(name: str) -> None:
    """The rule is read from the class and the live criterion."""
    module, _, rule = TASKS[name]
    assert find_loss_counter(module(), None).rule.removesuffix("Task") == rule


def test_order_of_the_rules() -> None:
    """The strategy's callable comes before the module's method, that before what is known, that before samples."""
    task = segmentation()
    assert find_loss_counter(task, lambda _, __: 1.0).rule == "the strategy's loss_count"
    task.loss_count = lambda _: 1.0
    assert find_loss_counter(task, None).rule == "the module's loss_count"
    assert find_loss_counter(nn.Linear(1, 1), None).rule == "samples"


def test_an_overridden_training_step_is_not_trusted() -> None:
    """A subclass that trains in its own way may divide by anything: samples, with the code to paste."""

    class Own(geography.task("SemanticSegmentation")):
        def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().training_step(batch, batch_idx, dataloader_idx)

    counter = find_loss_counter(Own(**FCN, num_classes=4, ignore_index=0), None)
    assert counter.rule == "samples"
    assert "cross_entropy_count(self.criterion, batch['mask'])" in counter.advice
    assert not find_loss_counter(Own(**FCN, num_classes=4), None).advice, "nothing is ignored: samples are right"


def test_the_live_criterion_counts() -> None:
    """A criterion that was replaced after construction is the one that is read."""
    task = segmentation()
    counter = find_loss_counter(task, None)
    batch = {"mask": torch.tensor([[0, 1], [1, 1]])}
    assert float(counter(task, batch)) == 4
    task.criterion = nn.CrossEntropyLoss(ignore_index=1)
    assert float(counter(task, batch)) == 1


@pytest.mark.parametrize("loss", ["jaccard", "focal"])
def test_losses_that_are_no_means_count_samples(loss: str) -> None:
    """No weighting makes them exact."""
    assert find_loss_counter(segmentation(loss=loss), None).rule == "samples"


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 3.0])])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_cross_entropy_count_is_the_divisor(weight: Any, ignore_index: int) -> None:
    """Sum of the unreduced loss divided by the count is the mean that torch computes."""
    logits, target = torch.randn(6, 3, 4, 4), torch.randint(3, (6, 4, 4))
    mean = nn.CrossEntropyLoss(weight=weight, ignore_index=ignore_index)
    total = nn.CrossEntropyLoss(weight=weight, ignore_index=ignore_index, reduction="sum")
    assert float(total(logits, target) / cross_entropy_count(mean, target)) == pytest.approx(
        float(mean(logits, target))
    )


def test_samples_are_counted_in_any_batch() -> None:
    """The length of the first tensor with a batch dimension."""
    assert sample_count({"name": "x", "scale": torch.tensor(2.0), "image": torch.zeros(5, 2)}) == 5
    assert sample_count([torch.zeros(3), torch.zeros(4)]) == 3
    with pytest.raises(TypeError, match="no tensor"):
        sample_count(["a", "b"])


@dataclass(slots=True)
class Outer:
    """A batch that keeps its tensors one level down."""

    name: str
    inner: Any


def test_samples_are_counted_in_nested_dataclasses() -> None:
    """With slots or without, and with whatever collections in between."""
    assert sample_count(Outer("a", {"x": [torch.zeros(7, 2)]})) == 7
    assert sample_count(Outer("a", Outer("b", torch.zeros(3)))) == 3


def warned() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hetero_fit(Recipe(module=partial(Classifier, ignore_index=0, declares=False), max_epochs=1), {})
    return [str(w.message) for w in caught if "def loss_count(self, batch)" in str(w.message)]


def test_the_advice_is_given_once() -> None:
    """Where samples are only a guess, one warning says so, with the code to paste."""
    assert [len(messages) for messages in run_ranks(2, warned)] == [1, 0]


# ---- batches whose tensors have different lengths, and compiled modules ----


def as_tuples(samples: list[Any]) -> tuple[Any, ...]:
    """What detection scripts use: a tuple of images, and one of boxes."""
    pairs = [(sample["x"], sample["y"].expand(1 + int(sample["index"]) % 3, 2)) for sample in samples]
    return tuple(zip(*pairs, strict=True))


class Boxed(Regression):
    """A mean over the samples of a batch that is no tensor."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, boxes = batch
        target = torch.stack([each.mean() for each in boxes])
        return nn.functional.mse_loss(self.net(torch.stack(features)).squeeze(-1), target)


def boxed(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(49), batch_size=batch_size, collate_fn=as_tuples)


def test_batches_of_unequal_lengths_count_the_samples_that_went_into_them() -> None:
    """The first tensor's length is that of a sample's features: counted so, all ranks would weigh the same."""
    recipe = Recipe(module=Boxed, loader=boxed)
    alone = plain_fit(recipe, 12)
    for out in run_ranks(2, hetero_fit, recipe, {"shares": [3, 1]}):
        assert relative_error(out["parameters"], alone["parameters"]) <= 1e-12


def test_a_compiled_task_counts_as_it_does_uncompiled() -> None:
    """Lightning sets a compiled module's steps on the instance, where otherwise only the user does."""
    geography.tolerate_torchgeo()
    task = from_compiled(torch.compile(segmentation(loss="ce", ignore_index=0)))
    assert find_loss_counter(task, None).rule.startswith("valid targets")
    own = segmentation(loss="ce", ignore_index=0)
    own.training_step = lambda batch, batch_idx: None
    assert find_loss_counter(own, None).rule == "samples"
    assert find_loss_counter(from_compiled(torch.compile(own)), None).rule == "samples"
