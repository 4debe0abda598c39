"""What the demo trains: TorchGeo's own task on the scene, the same on all sides."""

from dataclasses import dataclass

from torchgeo.trainers import SemanticSegmentationTask

from lightning_hetero.demo.scene import BANDS, CLASSES, UNLABELLED, SceneDataModule


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters.

    Args:
        global_batch: patches in a step, over all ranks.
        patch_size: pixels along a patch's side.
        learning_rate: of AdamW.
        filters: of the fully convolutional network.
        seed: of the weights and of the patches.
    """

    global_batch: int = 48
    patch_size: int = 48
    learning_rate: float = 4e-3
    filters: int = 32
    seed: int = 0

    def task(self) -> SemanticSegmentationTask:
        """TorchGeo's task, unchanged."""
        return SemanticSegmentationTask(
            model="fcn",
            num_filters=self.filters,
            in_channels=len(BANDS),
            num_classes=len(CLASSES),
            loss="ce",
            ignore_index=UNLABELLED,
            lr=self.learning_rate,
        )

    def data(self, ranks: int, steps: int) -> SceneDataModule:
        """The data module as a user makes it: `batch_size` is that of one rank.

        Args:
            ranks: how many share a global batch.
            steps: optimizer steps in an epoch.
        """
        return SceneDataModule(self.global_batch // ranks, self.patch_size, steps * self.global_batch, self.seed)
