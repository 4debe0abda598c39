"""`Trainer(sync_batchnorm=True)` with layers that are exact under uneven shares, on CPUs too."""

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch.nn import Module
from typing_extensions import override

from lightning_hetero.step.sync_batch_norm import BatchNormGroup, convert_sync_batchnorm, revert_sync_batchnorm


class ExactSyncBatchNorm(LayerSync):
    """Converts BatchNorm layers while the module trains.

    Args:
        batch_norm_group: shared by the layers.
    """

    def __init__(self, batch_norm_group: BatchNormGroup) -> None:
        self.batch_norm_group = batch_norm_group

    @override
    def apply(self, model: Module) -> Module:
        convert_sync_batchnorm(model, self.batch_norm_group)
        return model

    @override
    def revert(self, model: Module) -> Module:
        revert_sync_batchnorm(model)
        return model
