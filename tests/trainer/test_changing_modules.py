"""Modules whose trainable parameters change during training: they end as those of one plain process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.changing import (
    Adversarial,
    AllWithinStep,
    Alternating,
    ByBatch,
    ByEpoch,
    ByEpochNormalized,
    Compiled,
    FirstLayer,
    FrozenAtFirst,
    Growing,
    Resting,
    TwoParts,
    WithinManualStep,
    WithinStep,
)
from tests.trainer.fits import (
    Numbers,
    Recipe,
    hetero_fit,
    keep_counts_on_device,
    make_trainer,
    parameters_of,
    plain_fit,
    plain_loader,
    relative_error,
)

EXACT = 1e-12
"""What the order of summation may cost in double precision."""


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


def fit_all(shares: list[float], names: list[str], counts_on_device: bool = False) -> list[dict[str, Any]]:
    if counts_on_device:
        keep_counts_on_device()
    return [hetero_fit(made(FITS[name][0]), {"shares": shares, **FITS[name][1]}) for name in names]


@pytest.mark.parametrize(
    ("shares", "counts_on_device"),
    [
        pytest.param([3, 1], False, id="two ranks"),
        pytest.param([5, 1, 2], True, id="three ranks, counts that only the device knows"),
        pytest.param([1], False, id="one rank"),
    ],
)
def test_parameters_end_as_in_one_process(shares: list[float], counts_on_device: bool) -> None:
    """Fails where DDP keeps the wrapper that it was given at the start: each rank then trains its own backbone."""
    names = [name for name in FITS if len(shares) > 1 or name != "sync_batchnorm"]  # torch's, with one rank
    ranks = run_ranks(len(shares), fit_all, shares, names, counts_on_device)
    for number, name in enumerate(names):
        recipe, _ = FITS[name]
        plain = plain_fit(made(recipe), recipe.batch_size * len(shares))
        for rank, outs in enumerate(ranks):
            error = relative_error(outs[number]["parameters"], plain["parameters"])
            assert error <= EXACT, f"{name}: rank {rank} is off by {error:.1e}"
            assert outs[number]["step"] == plain["step"], name


def adversarial_fit(strategy: Any, devices: int, batch_size: int) -> tuple[torch.Tensor, int]:
    module = Adversarial()
    make_trainer(strategy, devices).fit(module, plain_loader(batch_size))
    return parameters_of(module), len(module.wrappers)


def adversarial_rank() -> tuple[torch.Tensor, int]:
    return adversarial_fit(HeteroStrategy(shares=[3, 1], find_unused_parameters=True), 2, 6)


def test_parameters_that_pause_within_a_step_need_no_new_wrapper() -> None:
    """Two wrappers a step would cost more than the step."""
    plain, _ = adversarial_fit("auto", 1, 12)
    for parameters, wrappers in run_ranks(2, adversarial_rank):
        assert relative_error(parameters, plain) <= EXACT
        assert wrappers == 1


def resumed(make_fit: Any, batch_size: int, folder: str) -> torch.Tensor:
    """Parameters after a fit with `BackboneFinetuning` that was interrupted in its third epoch."""
    for epochs in (2, 4):
        module = TwoParts(frozen=False, head_only=True)
        trainer = make_fit(
            callbacks=[*finetuning(), ModelCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)],
            enable_checkpointing=True,
            max_epochs=epochs,
        )
        trainer.fit(module, plain_loader(batch_size), ckpt_path=f"{folder}/last.ckpt" if epochs == 4 else None)
    assert len(trainer.optimizers[0].param_groups) == 2
    return parameters_of(module)


def resumed_on_rank(folder: str) -> torch.Tensor:
    def make(**options: Any) -> Any:
        return make_trainer(HeteroStrategy(shares=[3, 1]), 2, **options)

    return resumed(make, 6, folder)


def test_finetuning_that_resumes(tmp_path: Path) -> None:
    """`BackboneFinetuning` restores its parameter groups; what trains then is what trains in one process."""
    plain = resumed(partial(make_trainer, "auto", 1), 12, str(tmp_path / "plain"))
    for parameters in run_ranks(2, resumed_on_rank, str(tmp_path / "ranks")):
        assert relative_error(parameters, plain) <= EXACT
