"""`Trainer(sync_batchnorm=True)` with layers that are exact under uneven shares, on CPUs too."""

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch.nn import Module
from typing_extensions import override

from lightning_hetero.step.sync_batch_norm import BatchNormGroup, separate, synchronise


class ExactSyncBatchNorm(LayerSync):
    """In place of Lightning's plugin.

    Args:
        batch_norm_group: between the layers of all ranks.
    """

    def __init__(self, batch_norm_group: BatchNormGroup) -> None:
        self.batch_norm_group = batch_norm_group

    @override
    def apply(self, model: Module) -> Module:
        synchronise(model, self.batch_norm_group)
        return model

    @override
    def revert(self, model: Module) -> Module:
        separate(model)
        return model
