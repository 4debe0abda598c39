"""TorchGeo's tasks as small cases: how each is made, its data, and what the documentation says of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from tests.trainer.geography import task

EDGE = 32


@dataclass(frozen=True)
class Case:
    """One row of the table in the documentation.

    Args:
        task: the name of the task in TorchGeo 0.10.
        loss: as the table names it.
        options: of the task.
        target: what the data set makes; see `Images`.
        strategy: that fits it; None where it is not fitted, as the rule and the gradient say enough.
        trainer: options of its fit.
        random: the loss draws random numbers, so that no two computations are alike.
    """

    task: str
    loss: str
    options: dict[str, Any]
    target: str
    strategy: str | None = "hetero"
    trainer: dict[str, Any] = field(default_factory=dict)
    random: bool = False

    def make(self) -> Any:
        """The task in double precision, the same each time."""
        torch.manual_seed(1)
        module = task(self.task)(in_channels=3, **self.options).double()
        if self.target == "boxes":  # torchvision enlarges images to 800 pixels, which takes most of a minute here
            module.model.transform.min_size, module.model.transform.max_size = (2 * EDGE,), 4 * EDGE
        return module

    def loader(self, size: int, batch_size: int) -> DataLoader[Any]:
        """Samples in order."""
        return DataLoader(Images(size, self.target), batch_size=batch_size, collate_fn=collate)


class Images(Dataset[Any]):
    """Small images with all the targets that a task asks for."""

    def __init__(self, size: int, target: str) -> None:
        generator = torch.Generator().manual_seed(5)
        edge = EDGE if target in {"label", "labels", "number", "boxes", "views", "mask of 32"} else 8
        frames = (2,) if target.startswith("change") else (4,) if target.startswith("series") else ()
        self.image = torch.randn(size, *frames, 3, edge, edge, generator=generator, dtype=torch.float64)
        self.mask = torch.randint(4, (size, edge, edge), generator=generator)
        self.mask[::3] = 0
        self.label = torch.randint(4, (size,), generator=generator)
        self.corner = torch.randint(16, (size, 4, 2), generator=generator).double()
        self.series = torch.randn(size, 24, 3, generator=generator, dtype=torch.float64)
        self.target = target

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask, label = self.image[index], self.mask[index], self.label[index]
        if self.target == "series":
            return {"input": self.series[index], "target": self.series[index, :2, :1]}
        if self.target == "boxes":
            corner = self.corner[index][: 1 + index % 4]
            # Boxes come first, as they may in a data set of one's own: their number is not that of the images.
            return {
                "bbox_xyxy": torch.cat([corner, corner + 12], 1),
                "label": torch.ones(len(corner), dtype=torch.long),
                "image": image,
                "mask": torch.ones(len(corner), EDGE, EDGE, dtype=torch.uint8),
            }
        targets = {
            "label": {"label": label},
            "labels": {"label": nn.functional.one_hot(label, 4)},
            "number": {"label": label.double()},
            "mask": {"mask": mask},
            "mask of 32": {"mask": mask},
            "series to mask": {"mask": mask},
            "numbers": {"mask": mask.double()},
            "series to numbers": {"mask": mask.double()},
            "binary mask": {"mask": mask.clamp(max=1)},
            "change": {"mask": mask.clamp(max=1)[None]},
            "change of classes": {"mask": mask[None]},
            "views": {},
        }
        return {"image": image, **targets[self.target]}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; boxes stay in lists, one entry an image."""
    if "bbox_xyxy" not in samples[0]:
        return default_collate(samples)
    lists = {key: [sample[key] for sample in samples] for key in ("bbox_xyxy", "label", "mask")}
    return {**lists, "image": torch.stack([sample["image"] for sample in samples])}


FCN = {"model": "fcn", "num_filters": 4, "lr": 0.01}
SMALL = {"model": "test_convnext", "lr": 0.001}  # has no BatchNorm
NORMAL = {"model": "test_resnet", "lr": 0.001}  # has
WEIGHTS = [1.0, 4.0, 0.5, 2.0]
BOXES = {"backbone": "resnet18", "num_classes": 2, "trainable_layers": 5, "lr": 0.0001}
SYNCED = {"sync_batchnorm": True}
VIEWS = {"size": EDGE, "version": 1, "layers": 2, "memory_bank_size": 0, "hidden_dim": 16, "output_dim": 16}

_segmentation = partial(Case, "SemanticSegmentation")
_change = partial(Case, "ChangeDetection")

CASES: list[Case] = [
    Case("Classification", "`ce`", {**NORMAL, "num_classes": 4}, "label", trainer=SYNCED),
    Case("Classification", "`ce`, class weights", {**SMALL, "num_classes": 4, "class_weights": WEIGHTS}, "label", None),
    Case(
        "Classification",
        "`bce`, several labels",
        {**SMALL, "task": "multilabel", "num_labels": 4, "loss": "bce"},
        "labels",
    ),
    Case(
        "Classification",
        "`focal`",
        {**SMALL, "num_classes": 4, "loss": "focal"},
        "label",
        None,
    ),
    _segmentation("`ce`", {"model": "unet", "backbone": "resnet18", "num_classes": 4}, "mask of 32", trainer=SYNCED),
    _segmentation(
        "`ce`, `ignore_index`, class weights",
        {**FCN, "num_classes": 4, "ignore_index": 0, "class_weights": WEIGHTS},
        "mask",
    ),
    _segmentation("`bce`", {**FCN, "task": "binary", "loss": "bce"}, "binary mask", None),
    _segmentation("`jaccard`", {**FCN, "num_classes": 4, "loss": "jaccard", "ignore_index": 0}, "mask"),
    _segmentation("`focal`", {**FCN, "num_classes": 4, "loss": "focal", "ignore_index": 0}, "mask"),
    _change("`bce`", {**FCN, "task": "binary", "loss": "bce"}, "change"),
    _change("`ce`", {**FCN, "task": "multiclass", "num_classes": 4, "loss": "ce"}, "change of classes", None),
    _change("`dice`", {**FCN, "task": "binary", "loss": "dice"}, "change", None),
    Case("Regression", "`mse`", {**SMALL, "loss": "mse"}, "number"),
    Case("PixelwiseRegression", "`mae`", {**FCN, "loss": "mae"}, "numbers"),
    Case("TemporalRegression", "`mse`", {"out_steps": 2, "dropout": 0.0}, "series", None),
    Case("SpatioTemporalSegmentation", "`ce`", {"num_classes": 4}, "series to mask", None),
    Case("SpatioTemporalPixelwiseRegression", "`mse`", {}, "series to numbers", None),
    Case("ObjectDetection", "RetinaNet", {**BOXES, "model": "retinanet"}, "boxes"),
    Case("ObjectDetection", "FCOS", {**BOXES, "model": "fcos"}, "boxes", None),
    Case("ObjectDetection", "Faster R-CNN", {**BOXES, "model": "faster-rcnn"}, "boxes", None, random=True),
    Case(
        "InstanceSegmentation",
        "Mask R-CNN",
        {"backbone": "resnet50", "num_classes": 2, "model": "mask-rcnn"},
        "boxes",
        None,
        random=True,
    ),
    Case("SimCLR", "contrastive", {**VIEWS, "model": "test_resnet"}, "views", trainer=SYNCED, random=True),
    Case("MoCo", "contrastive", {"model": "test_resnet"}, "views", None, random=True),
    Case(
        "BYOL",
        "between views",
        {"model": "test_resnet"},
        "views",
        "hetero_find_unused_parameters_true",
        random=True,
    ),
    Case("MAE", "on masked patches", {"model": "vit_tiny_patch16_224", "size": EDGE}, "views", None, random=True),
]


def loss_of(module: Any, batch: Any) -> torch.Tensor:
    """What the task computes in a training step, without dropout and BatchNorm's statistics."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            layer.eval()
    module.log = module.log_dict = lambda *_, **__: None
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(target_mean=0.0, target_std=1.0))
    torch.manual_seed(9)
    return module.training_step(batch, 0)


def gradient(module: Any, batch: Any, weight: float = 1.0) -> torch.Tensor:
    """Of the weighted loss, all parameters in one vector; the weight is on the loss, as the strategy puts it there."""
    module.zero_grad()
    (loss_of(module, batch) * weight).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def bound(case: Case) -> float:
    """The relative error that "exact" allows.

    The weight of a rank is on its loss, and so has the precision of that. TorchGeo turns the targets of `bce` into
    single precision, and its loss is single then, also in a module in double precision.
    """
    module = case.make()
    single = loss_of(module, collate([Images(2, case.target)[i] for i in range(2)])).dtype == torch.float32
    return 1e-6 if single else 1e-9


def off(case: Case, count: Callable[[Any, Any], Any], parts: tuple[int, int]) -> float:
    """How far the count-weighted mean of the gradients of two parts is from the gradient of all their samples."""
    module = case.make()
    samples = [Images(8, case.target)[i] for i in range(sum(parts))]
    batches = [collate(samples[: parts[0]]), collate(samples[parts[0] :])]
    counts = [float(count(module, batch)) for batch in batches]
    mean = sum(gradient(module, batch, c / sum(counts)) for c, batch in zip(counts, batches, strict=True))
    whole = gradient(module, collate(samples))
    return float((mean - whole).abs().max() / whole.abs().max())


def param(case: Case) -> Any:
    return pytest.param(case, id=f"{case.task} {case.loss}")
