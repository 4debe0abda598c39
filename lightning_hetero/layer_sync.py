"""`Trainer(sync_batchnorm=True)` with layers that are exact under uneven shares, on CPUs too."""

from lightning.pytorch.plugins.layer_sync import LayerSync
from torch.nn import Module
from typing_extensions import override

from lightning_hetero.sync_batch_norm import Ties, separate, synchronise


class ExactSyncBatchNorm(LayerSync):
    """In place of Lightning's plugin.

    Args:
        ties: between the layers of all ranks.
    """

    def __init__(self, ties: Ties) -> None:
        self.ties = ties

    @override
    def apply(self, model: Module) -> Module:
        synchronise(model, self.ties)
        return model

    @override
    def revert(self, model: Module) -> Module:
        separate(model)
        return model
