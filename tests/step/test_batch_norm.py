"""Statistics of parts become those of the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hetero.step.batch_norm import pooled_statistics

SIZES = st.lists(st.integers(2, 20), min_size=1, max_size=5)


def parts(sizes: list[int], seed: int, offset: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, 3, generator=generator, dtype=torch.float64) * (rank + 1) + offset + rank
        for rank, size in enumerate(sizes)
    ]


@given(SIZES, st.integers(0, 1000), st.sampled_from([0.0, 1e3, -1e6]))
def test_parts_give_the_whole(sizes: list[int], seed: int, offset: float) -> None:
    """Mean and biased variance of disjoint parts are those of all together, also where means are large."""
    batches = parts(sizes, seed, offset)
    whole = torch.cat(batches)
    mean, variance = pooled_statistics(
        torch.tensor(sizes, dtype=torch.float64),
        torch.stack([batch.mean(0) for batch in batches]),
        torch.stack([batch.var(0, unbiased=False) for batch in batches]),
    )
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, whole.var(0, unbiased=False), rtol=1e-9, atol=0)


@given(SIZES, st.integers(0, 1000))
def test_running_statistics_of_one_step(sizes: list[int], seed: int) -> None:
    """With momentum 1, the pooled running variance exceeds the whole's biased variance as documented, and no more."""
    batches = parts(sizes, seed, 5.0)
    layers = [nn.BatchNorm1d(3, momentum=1.0, dtype=torch.float64) for _ in sizes]
    for layer, batch in zip(layers, batches, strict=True):
        layer(batch)
    counts = torch.tensor(sizes, dtype=torch.float64)
    mean, variance = pooled_statistics(
        counts,
        torch.stack([layer.running_mean for layer in layers]),
        torch.stack([layer.running_var for layer in layers]),
    )
    whole = torch.cat(batches)
    biased = torch.stack([batch.var(0, unbiased=False) for batch in batches])
    excess = (counts[:, None] / counts.sum() * biased / (counts[:, None] - 1)).sum(0)
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, whole.var(0, unbiased=False) + excess, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 1000))
def test_equal_parts_give_exactly_themselves(sizes: list[int], seed: int) -> None:
    """Frozen layers stay bitwise the same, and parts with a count of 0 may contain anything."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(4, generator=generator, dtype=torch.float64)
    variance = torch.rand(4, generator=generator, dtype=torch.float64)
    counts = torch.tensor(sizes, dtype=torch.float64)
    lost = counts[:, None] == 0
    means, variances = (torch.where(lost, torch.nan, value.expand(len(sizes), 4)) for value in (mean, variance))
    got = pooled_statistics(counts, means, variances)
    assert torch.equal(got[0], mean)
    assert torch.equal(got[1], variance)


def test_an_example_by_hand() -> None:
    """Three samples around 0 and one at 4: mean 1; variance 3/4 · (2 + 1) + 1/4 · 9 = 4.5."""
    mean, variance = pooled_statistics(
        torch.tensor([3.0, 1.0]), torch.tensor([[0.0], [4.0]]), torch.tensor([[2.0], [0.0]])
    )
    assert mean.item() == pytest.approx(1.0)
    assert variance.item() == pytest.approx(4.5)
