"""Averaging after a backward pass gives what DDP's averaging during it does."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.exchange.failures import CollectiveErrors
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.step import gradients
from lightning_hetero.step.gradients import average_gradients, averaging_hook
from tests.ranks import run_ranks


class Branches(nn.Module):
    """Each rank uses another branch, and no rank uses the last one; of two types, in buckets of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.branches = nn.ModuleList([nn.Linear(5, 2) for _ in range(4)])
        self.branches[1].double()

    def forward(self, x: Tensor, rank: int) -> Tensor:
        branch = self.branches[rank]
        return branch(x.to(branch.weight.dtype)).sum()


def averaged() -> tuple[bool, bool, bool]:
    rank = dist.get_rank()
    group = RankGroup(rank, 3, timedelta(seconds=30))
    x = torch.full((4, 5), rank + 1.0)
    plain, hooked, afterwards = Branches(), Branches(), Branches()
    reference = DistributedDataParallel(plain, find_unused_parameters=True)
    reference(x, rank).backward()
    model = DistributedDataParallel(hooked, find_unused_parameters=True)
    model.register_comm_hook(None, averaging_hook(CollectiveErrors()))
    model(x, rank).backward()
    afterwards(x, rank).backward()
    gradients._BUCKET_BYTES = 30  # in this process, which ends with the test
    average_gradients(list(afterwards.parameters()), group, "averaging")
    unused = afterwards.branches[3].weight.grad is None
    return unused, same(plain, hooked), same(plain, afterwards)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = [(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True) if b.grad is not None]
    return len(pairs) >= 6 and all(torch.allclose(a, b, rtol=1e-6) for a, b in pairs)


def test_ddps_own_averaging_the_hook_and_averaging_afterwards_agree() -> None:
    """With parameters that some ranks don't use; what no rank uses keeps no gradient."""
    assert run_ranks(3, averaged) == [(True, True, True)] * 3
