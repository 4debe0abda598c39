"""`Trainer(sync_batchnorm=True)` with layers that are exact under uneven shares, on CPUs too."""

from dataclasses import dataclass

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch.nn import Module
from typing_extensions import override

from lightning_hetero.step.sync_batch_norm import BatchNormGroup, convert_sync_batchnorm, revert_sync_batchnorm


@dataclass(frozen=True)
class ExactSyncBatchNorm(LayerSync):
    """Converts BatchNorm layers before training, and back after it; all layers share one group."""

    batch_norm_group: BatchNormGroup

    @override
    def apply(self, model: Module) -> Module:
        convert_sync_batchnorm(model, self.batch_norm_group)
        return model

    @override
    def revert(self, model: Module) -> Module:
        revert_sync_batchnorm(model)
        return model
