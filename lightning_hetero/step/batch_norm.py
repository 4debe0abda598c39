"""The smallest local batch that BatchNorm allows, and pooling the statistics of several parts."""

from collections.abc import Iterator

from torch import Tensor, nn, where
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_hetero.step.torchgeo import uses_batch_statistics


def modules_without_metrics(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all its submodules except torchmetrics, which synchronize themselves."""
    if isinstance(module, Metric):
        return
    yield module
    for child in module.children():
        yield from modules_without_metrics(child)


def smallest_local_batch(module: nn.Module, *, synchronized: bool = False) -> int:
    """The fewest samples that a rank can compute with: 2 if statistics are computed over them, else 1.

    A layer that is kept in evaluation mode uses its running statistics, and `SyncBatchNorm` those of all ranks, as all
    BatchNorm layers do if they are `synchronized`.
    """
    in_use = not synchronized and any(
        isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm) and layer.training
        for layer in module.modules()
    )
    return 2 if in_use or uses_batch_statistics(module) else 1


def pooled_statistics(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a whole from those of its parts: the law of total variance.

    With shares `p_r = n_r / Σ n`: mean `m = Σ p_r m_r`, variance `Σ p_r (v_r + (m_r - m)²)`. For biased variances of
    disjoint parts this is exactly the biased variance of the whole (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", Stanford, STAN-CS-79-773, 1979). Computed as
    differences from the first part, so that pooling equal parts reproduces them exactly, and no digits cancel if the
    means are large compared with the deviations.

    Args:
        counts: n_r, (R,), at least 0 and not all 0.
        means: m_r, (R, C); in a part with a count of 0, anything is allowed, even NaN.
        variances: v_r, (R, C).

    Returns:
        Mean and variance, (C,) each.
    """
    counts = counts[:, None]  # (R, 1)
    shares = counts / counts.sum()  # (R, 1)
    counted = counts > 0  # (R, 1)
    first = counted.to(counts.dtype).argmax(0).expand(1, means.shape[1])  # (1, C); stays on the device
    mean, variance = means.gather(0, first), variances.gather(0, first)  # (1, C), of the first part that counts
    shift = where(counted, means - mean, 0.0)  # (R, C)
    mean_shift = (shares * shift).sum(0)  # (C,)
    spread = where(counted, variances - variance, 0.0) + (shift - mean_shift).square()  # (R, C)
    return mean[0] + mean_shift, variance[0] + (shares * spread).sum(0)  # (C,)
