"""What is trained: models, synthetic data of their shape, and a LightningModule around them."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 10
_STEPS = 4000  # that an epoch is long: no side comes to the end of one
_MOST_STORED, _STORED_BYTES = 512, 64 * 2**20  # different images; more would only cost memory


def _resnet18() -> Any:
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def _unet() -> Any:
    from segmentation_models_pytorch import Unet

    return Unet("resnet18", encoder_weights=None, classes=CLASSES)


def _fcn() -> Any:
    from torchgeo.models import FCN

    return FCN(in_channels=13, classes=CLASSES, num_filters=32)


MODELS = {"resnet18": _resnet18, "unet": _unet, "fcn": _fcn}
_BANDS = {"resnet18": 3, "unet": 3, "fcn": 13}
_PER_PIXEL = {"unet", "fcn"}


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated after a short training.

    Attributes:
        steps: of the training.
        samples: in an evaluation, which takes batches as large as those of the training loader.
    """

    steps: int
    samples: int


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        model: a key of `MODELS`.
        size: pixels of an image's side.
        global_batch: samples of a step over all ranks.
        evaluation: what is evaluated instead of training on; None to train on.
    """

    model: str
    size: int
    global_batch: int
    evaluation: Evaluation | None = None


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Synthetic images in memory, with a class for each image or for each of its pixels."""

    def __init__(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(5)
        self._length = _STEPS * task.global_batch
        bands = _BANDS[task.model]
        self._stored = min(_MOST_STORED, _STORED_BYTES // (4 * bands * task.size**2))
        self._images = torch.randn(self._stored, bands, task.size, task.size, generator=generator)
        shape = (self._stored, task.size, task.size) if task.model in _PER_PIXEL else (self._stored,)
        self._labels = torch.randint(CLASSES, shape, generator=generator)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index % self._stored], self._labels[index % self._stored]


class Classifier(pl.LightningModule):
    """Cross-entropy and SGD with momentum."""

    def __init__(self, model: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = MODELS[model]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
