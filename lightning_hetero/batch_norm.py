"""What BatchNorm asks of a split."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def smallest_local_batch(module: nn.Module) -> int:
    """The fewest samples that a rank can compute with: 2 where a live BatchNorm takes statistics over them, else 1.

    A layer that is kept in evaluation mode uses its running statistics, and `SyncBatchNorm` those of all ranks.
    """
    live = any(
        isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm) and layer.training
        for layer in module.modules()
    )
    return 2 if live else 1
