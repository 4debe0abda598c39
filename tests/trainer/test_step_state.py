"""State that steps change, and what they log, where a rank borrows samples or a step has several closures."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.regression import MeanSquaredError

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, plain_fit, relative_error
from tests.trainer.modules import Classifier

EXACT = 1e-12


def sized(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


class Annealed(Regression):
    """Its loss depends on a counter in a buffer, which it changes in place or replaces."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.register_buffer("it", torch.zeros((), dtype=torch.float64))
        self.replaces = replaces

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.replaces:
            self.it = self.it + 1
        else:
            self.it += 1
        self.log("it", self.it, batch_size=1)
        return super().training_step(batch, batch_idx) * (1 + self.it / 10)


class Spectral(Regression):
    """Each forward pass goes on with a power iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.utils.parametrizations.spectral_norm(self.net[0])


class Measured(Regression):
    """Logs the value of a metric that it computes in each step, on the samples of all steps or of this one."""

    def __init__(self, *, forward: bool) -> None:
        super().__init__()
        self.error = MeanSquaredError(dist_sync_on_step=forward).double()
        self.forward_value = forward

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch["x"]).squeeze(-1)
        if self.forward_value:
            value = self.error(out.detach(), batch["y"])
        else:
            self.error.update(out.detach(), batch["y"])
            value = self.error.compute()
        self.log("error", value, on_step=True, on_epoch=True)
        return F.mse_loss(out, batch["y"])


BORROWED = {
    "a counter": Recipe(partial(Annealed, replaces=False)),
    "a counter that is replaced": Recipe(partial(Annealed, replaces=True)),
    "spectral norm": Recipe(Spectral),
    "a metric": Recipe(partial(Measured, forward=False)),
    "a metric's step value": Recipe(partial(Measured, forward=True)),
}


def fits(recipes: dict[str, Recipe], options: dict[str, Any]) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="nothing in global batch|`broadcast_buffers` is deprecated")
    return {name: hetero_fit(recipe, options) for name, recipe in recipes.items()}


def require_parity(recipes: dict[str, Recipe], world_size: int, options: dict[str, Any]) -> None:
    outs = run_ranks(world_size, fits, recipes, options)
    for name, recipe in recipes.items():
        alone = plain_fit(recipe, world_size * recipe.batch_size)
        for out in outs:
            assert relative_error(out[name]["parameters"], alone["parameters"]) <= EXACT, name
            for key, value in alone["metrics"].items():
                assert out[name]["metrics"][key] == pytest.approx(value, rel=1e-6), (name, key)  # in single precision


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_borrowed_step_leaves_the_state_that_the_step_has_on_the_others(world_size: int) -> None:
    """The last global batch is one sample: counters and power iterations go on, and metrics leave it out once."""
    recipes = {
        name: Recipe(recipe.module, partial(sized, 25), batch_size=24 // world_size, max_epochs=3)
        for name, recipe in BORROWED.items()
    }
    require_parity(recipes, world_size, {"shares": [1, 3, 2][:world_size]})


def test_the_same_where_ddp_copies_buffers() -> None:
    """Rank 0, whose buffers DDP copies, is the one that borrows."""
    recipe = Recipe(partial(Annealed, replaces=False), partial(sized, 25), batch_size=12, max_epochs=3)
    require_parity({"": recipe}, 2, {"shares": [1, 3], "broadcast_buffers": True})


# ---- steps with several closures ----


class LossOfClosures(Classifier):
    """Logs the loss of each closure; class 0 does not count."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(ignore_index=0)
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.criterion(self.net(batch["x"]), batch["label"])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class SharpnessAware(torch.optim.SGD):
    """Takes the gradient a little further up, with a second closure."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.5)
        closure()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        super().step()
        return loss


class LossAsNumber(LossOfClosures):
    """A number is stored in single precision, so it is only nearly the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.criterion(self.net(batch["x"]), batch["label"])
        self.log("loss", loss.item(), on_step=False, on_epoch=True)
        return loss


def test_the_loss_of_each_closure_has_its_own_weight() -> None:
    """Under LBFGS and SAM; and a loss that is logged as a number is recognized."""
    recipes = {
        "SAM": Recipe(partial(LossOfClosures, partial(SharpnessAware, lr=0.1)), partial(sized, 60)),
        "LBFGS": Recipe(partial(LossOfClosures, partial(torch.optim.LBFGS, lr=0.1, max_iter=3)), partial(sized, 60)),
        "a number": Recipe(partial(LossAsNumber, partial(torch.optim.SGD, lr=0.1)), partial(sized, 60)),
    }
    require_parity(recipes, 2, {"shares": [3, 1]})
