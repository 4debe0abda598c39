"""One rank alone trains other parameters than before: all ranks stop, and say which parameters and ranks differ."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.exchange.waits import Waits
from lightning_hetero.trainer import job
from tests.ranks import fails_on_ranks
from tests.trainer.changing import TwoParts
from tests.trainer.fits import Recipe, hetero_fit


class Alone(TwoParts):
    """One rank changes by itself in the third step.

    Args:
        where: a hook.
        collective: how the forward pass waits for the other ranks, if it does.
        grows: whether it adds a layer; else it unfreezes its backbone.
    """

    def __init__(self, where: str, collective: str = "", *, grows: bool = False) -> None:
        super().__init__()
        self.where, self.collective, self.grows = where, collective, grows
        self.register_buffer("number", torch.zeros(1))
        if collective == "sync_batchnorm":
            self.net = nn.Sequential(nn.BatchNorm1d(8), self.net).double()

    def _change(self, where: str, batch_idx: int) -> None:
        if where == self.where and batch_idx == 2 and self.global_rank == 1:
            if self.grows:
                self.extra = nn.Linear(8, 1).double()
            else:
                self.backbone.requires_grad_()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._change("on_train_batch_start", batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._change("training_step", batch_idx)
        if self.collective == "all_reduce":
            torch.distributed.all_reduce(torch.ones(1))
        return super().training_step(batch, batch_idx)


IN_HOOK = (
    "the ranks do not train the same parameters in global batch 2: backbone.0.weight, backbone.0.bias, "
    "backbone.2.weight and 1 more train on rank 1, but not on rank 0."
)
ALONE: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "in a hook": (partial(Alone, "on_train_batch_start"), {}, {}, IN_HOOK),
    "the forward pass waits in sync_batchnorm": (
        partial(Alone, "on_train_batch_start", "sync_batchnorm"),
        {"sync_batchnorm": True},
        {},
        IN_HOOK,
    ),
    "the forward pass waits in a user's call": (partial(Alone, "on_train_batch_start", "all_reduce"), {}, {}, IN_HOOK),
    "the forward pass waits for buffers": (
        partial(Alone, "on_train_batch_start"),
        {},
        {"forward_sync_buffers": True},
        IN_HOOK,
    ),
    "a new layer": (
        partial(Alone, "on_train_batch_start", grows=True),
        {},
        {},
        "extra.weight, extra.bias train on rank 1, but not on rank 0.",
    ),
    "in training_step": (
        partial(Alone, "training_step"),
        {},
        {},
        "training_step has changed which parameters train in global batch 2 on rank 1, but not on all other ranks",
    ),
}


def fit_alone(name: str) -> None:
    module, trainer, strategy, _ = ALONE[name]
    # A wait of a third of a second is looked into, not only one of five; in this process, which ends with the test.
    job.Waits = partial(Waits, long=0.3, interval=0.1)
    hetero_fit(Recipe(module=module, **trainer), {"shares": [3, 1], **strategy})


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_that_changes_alone(name: str) -> None:
    """Every rank says which parameters, and where; none waits for a wrapper that the other will never make."""
    errors = fails_on_ranks(2, fit_alone, name)
    assert len(errors) == 2
    for text in errors.values():
        assert ALONE[name][3] in text.splitlines()[-1], text
