"""Modules whose trainable parameters change during training: they end as those of one plain process."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, plain_fit, relative_error

EXACT = 1e-12
"""What the order of summation may cost in double precision."""


class TwoParts(Regression):
    """A backbone and a head; `frozen` says whether the backbone begins frozen."""

    def __init__(self, *, frozen: bool = True, head_only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
        self.net = nn.Linear(8, 1).double()
        self.backbone.requires_grad_(not frozen)
        self.head_only = head_only

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        return F.mse_loss(self.net(self.backbone(batch["x"])).squeeze(-1), batch["y"])

    def configure_optimizers(self) -> Any:
        parameters = self.net.parameters() if self.head_only else self.parameters()
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)


class ByEpoch(TwoParts):
    """Unfreezes its backbone in the second epoch, and freezes it again in the third."""

    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch == 1)


class ByBatch(TwoParts):
    """Unfreezes its backbone in the middle of an epoch, and of a window of accumulation, and freezes it likewise."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone.requires_grad_(batch_idx in (1, 2, 3))


class FirstLayer(TwoParts):
    """The same, for one of its layers only."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone[0].requires_grad_(batch_idx in (1, 2, 3))


class WithinStep(TwoParts):
    """Decides in `training_step` itself what trains, before it computes anything."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.backbone.requires_grad_(batch_idx in (0, 1, 4))
        return super().training_step(batch, batch_idx)


class WithinManualStep(TwoParts):
    """The same with manual optimization, and only while `training_step` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone.requires_grad_(batch_idx in (0, 1, 4))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.backbone.requires_grad_(False)


class AllWithinStep(TwoParts):
    """Nothing trains before the first call of `training_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.requires_grad_(requires_grad=True)
        return super().training_step(batch, batch_idx)


class FrozenAtFirst(TwoParts):
    """Nothing trains before the first epoch begins."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)

    def on_train_epoch_start(self) -> None:
        self.requires_grad_(requires_grad=True)


class Alternating(TwoParts):
    """Trains its backbone and its head in turns."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone.requires_grad_(batch_idx % 2 == 0)
        self.net.requires_grad_(batch_idx % 2 == 1)


class Growing(TwoParts):
    """Gets another layer in the second epoch, whose first values are another rank's own; and a new head in the third."""

    def __init__(self) -> None:
        super().__init__(frozen=False)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)
        optimizer = self.trainer.optimizers[0]
        if self.current_epoch == 1:
            self.backbone.append(nn.Linear(8, 8).double())
            self.backbone[-1].register_buffer("noise", torch.randn(8, dtype=torch.float64))
            optimizer.add_param_group({"params": self.backbone[-1].parameters()})
        if self.current_epoch == 2:
            self.net = nn.Linear(8, 1).double()
            optimizer.add_param_group({"params": self.net.parameters()})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.backbone(batch["x"])
        if len(self.backbone) > 4:
            hidden = hidden + self.backbone[-1].noise
        return F.mse_loss(self.net(hidden).squeeze(-1), batch["y"])


class Resting(TwoParts):
    """Manual optimization; nothing trains in some steps."""

    def __init__(self) -> None:
        super().__init__(frozen=False)
        self.automatic_optimization = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.requires_grad_(batch_idx % 3 != 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        if loss.requires_grad:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


class Compiled(ByEpoch):
    """With a compiled backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.compile(backend="aot_eager", dynamic=True)


class ByEpochNormalized(ByEpoch):
    """With BatchNorm in the part that is frozen, and one more layer of it from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.insert(1, nn.BatchNorm1d(8).double())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            self.backbone.append(nn.BatchNorm1d(8).double())
            self.trainer.optimizers[0].add_param_group({"params": self.backbone[-1].parameters()})


def finetuning() -> list[Callback]:
    return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.5)]


def even(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(64), batch_size=batch_size)


FITS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "BackboneFinetuning": (
        Recipe(module=partial(TwoParts, frozen=False, head_only=True), max_epochs=4, callbacks=finetuning),
        {},
    ),
    "by epoch": (Recipe(module=ByEpoch, max_epochs=3), {}),
    "by epoch, copied gradients": (Recipe(module=ByEpoch, max_epochs=3), {"gradient_as_bucket_view": False}),
    "by epoch, find_unused_parameters": (Recipe(module=ByEpoch, max_epochs=3), {"find_unused_parameters": True}),
    "by epoch, static_graph": (Recipe(module=ByEpoch, max_epochs=3), {"static_graph": True}),
    "by epoch, DDP copies buffers": (Recipe(module=ByEpoch, max_epochs=3), {"forward_sync_buffers": True}),
    "by epoch, accumulation": (Recipe(module=ByEpoch, max_epochs=3, accumulate_grad_batches=2), {}),
    "by batch": (Recipe(module=ByBatch), {}),
    "by batch, accumulation": (Recipe(module=ByBatch, accumulate_grad_batches=3), {}),
    "one layer by batch, accumulation": (Recipe(module=FirstLayer, accumulate_grad_batches=3), {}),
    "one layer by batch, accumulation, find_unused_parameters": (
        Recipe(module=FirstLayer, accumulate_grad_batches=3),
        {"find_unused_parameters": True},
    ),
    "within training_step": (Recipe(module=WithinStep), {}),
    "within training_step, accumulation": (Recipe(module=WithinStep, accumulate_grad_batches=3), {}),
    "within training_step, manual": (Recipe(module=WithinManualStep), {}),
    "within training_step, find_unused_parameters": (Recipe(module=WithinStep), {"find_unused_parameters": True}),
    "nothing at first": (Recipe(module=FrozenAtFirst), {}),
    "nothing before training_step": (Recipe(module=AllWithinStep), {}),
    "a user's hook": (Recipe(module=ByBatch), {"ddp_comm_hook": allreduce_hook}),
    "a user's hook, within training_step": (Recipe(module=WithinStep), {"ddp_comm_hook": allreduce_hook}),
    "torch.compile": (Recipe(module=Compiled, max_epochs=3), {}),
    "static_graph, accumulation": (
        Recipe(module=ByEpoch, max_epochs=3, accumulate_grad_batches=2),
        {"static_graph": True},
    ),
    "static_graph, manual": (Recipe(module=Resting), {"static_graph": True}),
    "in turns": (Recipe(module=Alternating), {}),
    "new layers": (Recipe(module=Growing, max_epochs=3), {}),
    "new layers, accumulation": (Recipe(module=Growing, max_epochs=3, accumulate_grad_batches=2), {}),
    "nothing in some steps, manual": (Recipe(module=Resting), {}),
    "sync_batchnorm": (Recipe(module=ByEpochNormalized, loader=even, max_epochs=3, sync_batchnorm=True), {}),
}


def made(recipe: Recipe) -> Recipe:
    """With callbacks of its own, made in the process that uses them."""
    callbacks = recipe.trainer.get("callbacks")
    options = recipe.trainer | ({"callbacks": callbacks()} if callbacks else {})
    return Recipe(recipe.module, recipe.loader, recipe.batch_size, **options)


def fit_all(shares: list[float], names: list[str]) -> list[dict[str, Any]]:
    return [hetero_fit(made(FITS[name][0]), {"shares": shares, **FITS[name][1]}) for name in names]


def test_parameters_end_as_in_one_process() -> None:
    """Fails where DDP keeps the wrapper that it was given at the start: each rank then trains its own backbone."""
    ranks = run_ranks(2, fit_all, [3, 1], list(FITS))
    for number, (name, (recipe, _)) in enumerate(FITS.items()):
        plain = plain_fit(made(recipe), recipe.batch_size * 2)
        for rank, outs in enumerate(ranks):
            error = relative_error(outs[number]["parameters"], plain["parameters"])
            assert error <= EXACT, f"{name}: rank {rank} is off by {error:.1e}"
            assert outs[number]["step"] == plain["step"], name


class Adversarial(TwoParts):
    """Two optimizers, of which `toggled_optimizer` lets one train at a time; counts how often DDP has wrapped it."""

    def __init__(self) -> None:
        super().__init__(frozen=False)
        self.automatic_optimization = False
        self.wrappers: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.wrappers.add(id(self.trainer.strategy.model))
        for optimizer in self.optimizers():
            with self.toggled_optimizer(optimizer):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.backbone, self.net)]


class Alone(TwoParts):
    """One rank unfreezes its backbone by itself, in the third step.

    Args:
        where: a hook.
        collective: how the forward pass waits for the other ranks, if it does.
    """

    def __init__(self, where: str, collective: str = "") -> None:
        super().__init__()
        self.where, self.collective = where, collective
        if collective == "sync_batchnorm":
            self.net = nn.Sequential(nn.BatchNorm1d(8), self.net).double()
        self.register_buffer("number", torch.zeros(1))

    def _unfreeze(self, where: str, batch_idx: int) -> None:
        if where == self.where and batch_idx == 2 and self.global_rank == 1:
            self.backbone.requires_grad_()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._unfreeze("on_train_batch_start", batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._unfreeze("training_step", batch_idx)
        if self.collective == "all_reduce":
            torch.distributed.all_reduce(torch.ones(1))
        return super().training_step(batch, batch_idx)


ALONE = {
    "on_train_batch_start": (partial(Alone, "on_train_batch_start"), {}, {}),
    "sync_batchnorm": (partial(Alone, "on_train_batch_start", "sync_batchnorm"), {"sync_batchnorm": True}, {}),
    "all_reduce": (partial(Alone, "on_train_batch_start", "all_reduce"), {}, {}),
    "forward_sync_buffers": (partial(Alone, "on_train_batch_start"), {}, {"forward_sync_buffers": True}),
    "training_step": (partial(Alone, "training_step"), {}, {}),
}


def fit_alone(name: str) -> None:
    module, trainer, strategy = ALONE[name]
    hetero_fit(Recipe(module=module, **trainer), {"shares": [3, 1], **strategy})
