"""Evaluates a trained model on the columns that it was never trained on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchgeo.trainers import SemanticSegmentationTask

from lightning_hetero.demo.recipe import Recipe
from lightning_hetero.demo.scene import CLASSES, TRAINING_COLUMNS, UNLABELLED, Scene


@dataclass(frozen=True)
class Evaluation:
    """The validation columns, predicted once.

    Args:
        image: digital numbers, (bands, rows, columns).
        labels: classes, (rows, columns).
        prediction: classes, (rows, columns).
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int64]
    prediction: NDArray[np.int64]

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Counts of labelled pixels, (label, prediction), over all classes."""
        known = self.labels != UNLABELLED
        pairs = self.labels[known] * len(CLASSES) + self.prediction[known]
        return np.bincount(pairs, minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))

    @property
    def accuracy(self) -> float:
        """The fraction of labelled pixels that are predicted correctly."""
        confusion = self.confusion
        return float(confusion.trace() / confusion.sum())

    @property
    def majority_accuracy(self) -> float:
        """The accuracy of always naming the class that is most frequent in these columns."""
        labelled = self.confusion.sum(axis=1)
        return float(labelled.max() / labelled.sum())

    @property
    def iou(self) -> dict[str, float]:
        """Intersection over union of each class that is labelled somewhere."""
        confusion = self.confusion
        both, labelled, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
        return {
            land_cover.name: float(both[value] / (labelled[value] + predicted[value] - both[value]))
            for value, land_cover in enumerate(CLASSES)
            if labelled[value]
        }

    @property
    def mean_iou(self) -> float:
        """The mean over the classes."""
        return float(np.mean(list(self.iou.values())))


@torch.no_grad()
def evaluate(checkpoint: Path, recipe: Recipe) -> Evaluation:
    """Predict the validation columns with the model of a checkpoint.

    They are predicted as one patch, since the network is fully convolutional and the edges of patches would show.
    """
    task = SemanticSegmentationTask.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    data = recipe.data(ranks=1, steps=1)
    scene = Scene()
    x, y, _ = scene.bounds
    sample = scene[x.start + TRAINING_COLUMNS * x.step : x.stop, y.start : y.stop]
    image, labels = sample["image"], sample["mask"]
    normalized = data.aug({"image": image[None]})["image"]
    return Evaluation(image.numpy(), labels.numpy(), task(normalized).argmax(dim=1)[0].numpy())
