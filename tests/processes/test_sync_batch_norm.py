"""Synchronized BatchNorm on real ranks equals BatchNorm in one process with the whole batch."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_hetero.exchange.groups import all_reduce_in_own_group
from lightning_hetero.exchange.waits import Waits
from lightning_hetero.step.sync_batch_norm import (
    BatchNormGroup,
    SynchronizedBatchNorm,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from tests.ranks import fails_on_ranks, run_ranks

LAYERS = {
    "1d": (partial(nn.BatchNorm1d, 3), ()),
    "1d, no momentum": (partial(nn.BatchNorm1d, 3, momentum=None), (4,)),
    "2d": (partial(nn.BatchNorm2d, 3, momentum=0.3), (4, 5)),
    "3d, not affine": (partial(nn.BatchNorm3d, 3, affine=False), (2, 2, 3)),
    "2d, no statistics": (partial(nn.BatchNorm2d, 3, track_running_stats=False), (2, 2)),
}
STEPS = 3


def waits() -> Waits:
    return Waits(dist.get_rank(), dist.get_world_size(), "cpu", None, None)


def data(shape: tuple[int, ...], size: int, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(STEPS, size, 3, *shape, generator=generator, dtype=torch.float64) * 3 + 2
    factors = torch.randn(STEPS, size, 3, *shape, generator=generator, dtype=torch.float64)
    return values.to(dtype), factors.to(dtype)


def passes(layer: Any, values: Any, factors: Any, borrowed: bool = False) -> Any:
    """Outputs and gradients of a few steps on some of the samples, and the statistics at the end."""
    outs = []
    for value, factor in zip(values, factors, strict=True):
        x = value.clone().requires_grad_()
        y = layer(x)
        layer.zero_grad()
        (y * factor).sum().backward()
        gradients = [p.grad.clone() for p in layer.parameters()]
        outs.append((y.detach(), x.grad, gradients))
    return outs, [buffer.clone() for buffer in layer.buffers()]


def on_ranks(sizes: list[int], borrows: int | None = None, dtype: torch.dtype = torch.float64) -> Any:
    rank = torch.distributed.get_rank()
    batch_norm_group = BatchNormGroup(rank, len(sizes), all_reduce_in_own_group(None, waits(), "a layer"))
    start = sum(sizes[:rank])
    out = {}
    for name, (make, shape) in LAYERS.items():
        torch.manual_seed(1)
        layer = make().to(dtype)
        convert_sync_batchnorm(layer, batch_norm_group)
        values, factors = data(shape, sum(sizes), dtype)
        part = slice(start, start + sizes[rank])
        batch_norm_group.begin_step(borrowed=rank == borrows)
        if rank == borrows:
            part = slice(0, 2)
        out[name] = passes(layer, values[:, part], factors[:, part])
    return out


@pytest.mark.parametrize(("sizes", "borrows"), [([5, 2], None), ([4, 0, 1], None), ([3, 0, 2], 1), ([1, 1], None)])
def test_is_batch_norm_of_one_process(sizes: list[int], borrows: int | None) -> None:
    """Outputs, gradients and running statistics; with an empty rank, and with one whose samples are borrowed."""
    ranks = run_ranks(len(sizes), on_ranks, sizes, borrows)
    for name, (make, shape) in LAYERS.items():
        layer = make().double()
        values, factors = data(shape, sum(sizes))
        outs, statistics = passes(layer, values, factors)
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12, msg=name)
        for step, (y, gradient, parameters) in enumerate(outs):
            own = [r[name][0][step] for number, r in enumerate(ranks) if number != borrows]
            close(torch.cat([o[0] for o in own]), y)
            close(torch.cat([o[1] for o in own]), gradient)
            for number, parameter in enumerate(parameters):  # a borrowed sample adds nothing to them
                close(sum(r[name][0][step][2][number] for r in ranks), parameter)
        for rank in ranks:
            for value, expected in zip(rank[name][1], statistics, strict=True):
                close(value, expected)
            for value, first in zip(rank[name][1], ranks[0][name][1], strict=True):
                assert torch.equal(value, first), "bit by bit the same on all ranks"


def low(sizes: list[int]) -> Any:
    rank = torch.distributed.get_rank()
    layer = nn.BatchNorm2d(3)
    convert_sync_batchnorm(layer, BatchNormGroup(rank, len(sizes), all_reduce_in_own_group(None, waits(), "a layer")))
    values, factors = data((4, 4), sum(sizes), torch.bfloat16)
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return passes(layer, values[:, part], factors[:, part])


def test_bfloat16_under_autocast() -> None:
    """Outputs are bfloat16; statistics are taken in single precision."""
    ranks = run_ranks(2, low, [5, 2])
    layer = nn.BatchNorm2d(3)
    values, factors = data((4, 4), 7, torch.bfloat16)
    outs, statistics = passes(layer, values.float(), factors.float())
    for step, (y, gradient, _) in enumerate(outs):
        got = torch.cat([r[0][step][0] for r in ranks])
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), y, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(torch.cat([r[0][step][1] for r in ranks]).float(), gradient, rtol=2e-2, atol=2e-2)
    for value, expected in zip(ranks[0][1], statistics, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def one_value() -> None:
    layer = nn.BatchNorm1d(3)
    rank = torch.distributed.get_rank()
    convert_sync_batchnorm(layer, BatchNormGroup(rank, 2, all_reduce_in_own_group(None, waits(), "a layer")))
    layer(torch.zeros(1 - rank, 3))


def test_one_value_on_all_ranks_is_refused() -> None:
    """As in one process, and on every rank."""
    for text in fails_on_ranks(2, one_value).values():
        assert "more than 1 value per channel" in text


def test_layers_are_themselves_again() -> None:
    """Parameters, buffers and hooks are kept, copies and pickles work; torch's own SyncBatchNorm is converted too."""
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    before = {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    batch_norm_group = BatchNormGroup()
    convert_sync_batchnorm(net, batch_norm_group)
    assert [type(layer) for layer in net][1:] == [SynchronizedBatchNorm] * 2
    assert copy.deepcopy(net)[1].batch_norm_group is batch_norm_group
    assert pickle.loads(pickle.dumps(net))[1].batch_norm_group.world_size == 1
    with pytest.raises(ValueError, match="expected 4D"):
        net[1](torch.zeros(2, 3))
    net(torch.randn(2, 2, 4, 4))
    revert_sync_batchnorm(net)
    assert [type(layer) for layer in net][1:] == [nn.BatchNorm2d, nn.SyncBatchNorm]
    assert before == {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    assert not hasattr(net[1], "batch_norm_group")


def test_a_lazy_layer_without_a_batch_is_refused() -> None:
    """It has no statistics to share yet."""
    with pytest.raises(ValueError, match="LazyBatchNorm1d has not seen a batch"):
        convert_sync_batchnorm(nn.LazyBatchNorm1d(), BatchNormGroup())
