"""A rank that runs out of memory computes its batch in parts: nothing is lost, nothing twice, and its share is capped."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, merged, plain_fit, relative_error
from tests.trainer.modules import Classifier

EXACT = 1e-12
HUGE = 2**60
"""Bytes that no machine has: the allocator's own error comes, and takes no time."""


class _Breaks(torch.autograd.Function):
    """Really runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient + torch.empty(HUGE, dtype=torch.uint8)[0]


class Hungry(Regression):
    """Runs out of memory above a local batch on rank 1, in the forward or in the backward pass."""

    fits = 4
    broken = "forward"

    def __init__(self) -> None:
        super().__init__()
        self.tries: list[int] = []
        self.held: list[list[int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.held.append(batch["index"].tolist())

    def eat(self, x: torch.Tensor) -> torch.Tensor:
        self.tries.append(len(x))
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and len(x) > self.fits:
            if self.broken == "forward":
                torch.empty(HUGE, dtype=torch.uint8)
            return _Breaks.apply(x)
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net[:-1](batch["x"])
        return F.mse_loss(self.net[-1](self.eat(out)).squeeze(-1), batch["y"])


class HungryBackward(Hungry):
    broken = "backward"


def sized(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


RECIPES = {
    "forward": Recipe(module=Hungry),
    "backward": Recipe(module=HungryBackward),
    "forward, accumulation": Recipe(module=Hungry, accumulate_grad_batches=3),
    "backward, accumulation": Recipe(module=HungryBackward, accumulate_grad_batches=3),
}


def fit(name: str, strategy: dict[str, Any]) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy
    from tests.trainer.fits import make_trainer, parameters_of

    recipe = RECIPES[name]
    module = recipe.module()
    chosen = HeteroStrategy(**strategy)
    trainer = make_trainer(chosen, torch.distributed.get_world_size(), **recipe.trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, recipe.loader(recipe.batch_size))
    return {
        "parameters": parameters_of(module),
        "held": getattr(module, "held", None),
        "tries": getattr(module, "tries", None),
        "plans": [(plan.first_step, plan.local_batches, plan.reason) for plan in chosen._planner.schedule.plans],
        "warned": [str(w.message) for w in caught if "ran out of memory" in str(w.message)],
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "step": trainer.global_step,
    }


@pytest.mark.parametrize("shares", ["auto", [1, 1]], ids=str)
@pytest.mark.parametrize("name", list(RECIPES))
def test_smoke(name, shares):
    a, b = run_ranks(2, fit, name, {"shares": shares})
    plain = plain_fit(RECIPES[name], 12)
    print(b["tries"], b["plans"], a["warned"])
    for out in (a, b):
        assert relative_error(out["parameters"], plain["parameters"]) <= EXACT
        assert out["step"] == plain["step"]
