"""The averaged gradient is that of the global batch: parameters end as those of one plain process (G2, G3)."""

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.ranks import run_ranks
from tests.trainer.fits import (
    Numbers,
    Recipe,
    Regression,
    hetero_fit,
    keep_counts_on_device,
    merged,
    plain_fit,
    relative_error,
)
from tests.trainer.modules import Classifier, Manual, MaskedMean, Newton, Pairs, Single, Unused

EXACT = 1e-12
"""What the order of summation may cost in double precision."""

SPLITS = [
    pytest.param(1, {}, id="alone"),
    pytest.param(2, {"shares": [4, 1]}, id="two, 4:1"),
    pytest.param(3, {"shares": "auto"}, id="three, learned"),
    pytest.param(4, {"shares": [5, 1, 2, 1]}, id="four, 5:1:2:1"),
]


def sized(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


def two_loaders(batch_size: int) -> dict[str, DataLoader[Any]]:
    return {"a": DataLoader(Numbers(192), batch_size=batch_size), "b": DataLoader(Numbers(96), batch_size=batch_size)}


RECIPES = {
    "mean": Recipe(),
    "a last batch of one sample": Recipe(loader=partial(sized, 25), batch_size=6),
    "accumulation": Recipe(accumulate_grad_batches=3),
    "clipping by norm": Recipe(gradient_clip_val=0.1),
    "accumulation, clipping, short last batch": Recipe(
        loader=partial(sized, 49), accumulate_grad_batches=2, gradient_clip_val=0.1
    ),
    "clipping by value": Recipe(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "ignored targets": Recipe(module=partial(Classifier, ignore_index=0)),
    "empty ranks whose gradients are NaN": Recipe(
        module=partial(MaskedMean, ignore_index=1), loader=partial(sized, 24), batch_size=2
    ),
    "empty ranks whose gradients are NaN, accumulation": Recipe(
        module=partial(MaskedMean, ignore_index=1), loader=partial(sized, 24), batch_size=2, accumulate_grad_batches=2
    ),
    "class weights": Recipe(module=partial(Classifier, weight=[0.1, 3.0, 0.7, 1.3])),
    "class weights, ignored targets, accumulation": Recipe(
        module=partial(Classifier, weight=[0.1, 3.0, 0.7, 1.3], ignore_index=2), accumulate_grad_batches=2
    ),
    "manual optimization, two optimizers": Recipe(module=Manual),
    "LBFGS": Recipe(module=Newton, max_epochs=1),
    "two loaders": Recipe(module=Pairs, loader=two_loaders, batch_size=8),
}


def quiet_fit(recipe: Recipe, strategy: dict[str, Any]) -> dict[str, Any]:
    """A fit that may come across a global batch of ignored targets only, which causes a warning."""
    warnings.filterwarnings("ignore", message="nothing in global batch .* counts")
    return hetero_fit(recipe, strategy)


def fit_all(strategy: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    return [quiet_fit(RECIPES[name], strategy) for name in names]


@pytest.mark.parametrize(("world_size", "strategy"), SPLITS)
def test_parameters_end_as_in_one_process(world_size: int, strategy: dict[str, Any]) -> None:
    """Fails without weights, with weights by samples where targets are ignored, or when micro-batches are mixed up."""
    names = list(RECIPES)
    ranks = run_ranks(world_size, fit_all, strategy, names)
    for number, name in enumerate(names):
        plain = plain_fit(RECIPES[name], RECIPES[name].batch_size * world_size)
        for rank, outs in enumerate(ranks):
            error = relative_error(outs[number]["parameters"], plain["parameters"])
            assert error <= EXACT, f"{name}: rank {rank} is off by {error:.1e}"
            assert outs[number]["step"] == plain["step"], name


DDP_OPTIONS = {
    "find_unused_parameters": (Recipe(module=Unused), {"find_unused_parameters": True}),
    "gradient_as_bucket_view": (Recipe(), {"gradient_as_bucket_view": True}),
    "gradient_as_bucket_view, accumulation": (
        Recipe(accumulate_grad_batches=2),
        {"gradient_as_bucket_view": True},
    ),
    "static_graph": (Recipe(), {"static_graph": True}),
    "static_graph, manual": (Recipe(module=Manual), {"static_graph": True}),
    "static_graph, a short last batch": (Recipe(loader=partial(sized, 25)), {"static_graph": True}),
    "find_unused_parameters, short last batch": (
        Recipe(module=Unused, loader=partial(sized, 25)),
        {"find_unused_parameters": True},
    ),
    "bucket view, ignored targets": (
        Recipe(module=partial(Classifier, ignore_index=1), batch_size=2),
        {"gradient_as_bucket_view": True},
    ),
    "small buckets": (Recipe(), {"bucket_cap_mb": 0.0001}),
}


def fit_options(shares: Any) -> list[dict[str, Any]]:
    return [hetero_fit(recipe, {"shares": shares, **options}) for recipe, options in DDP_OPTIONS.values()]


def test_ddp_options_keep_the_gradient_exact() -> None:
    """All that DDPStrategy takes still works with uneven shares, borrowed samples and empty batches."""
    ranks = run_ranks(2, fit_options, [4, 1])
    for number, (name, (recipe, _)) in enumerate(DDP_OPTIONS.items()):
        plain = plain_fit(recipe, recipe.batch_size * 2)
        for outs in ranks:
            assert relative_error(outs[number]["parameters"], plain["parameters"]) <= EXACT, name


class OneStep(Single):
    """Keeps the gradient of its only step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = [torch.cat([p.grad.double().flatten() for p in self.parameters()]).tolist()]


def single(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(64, dtype=torch.float32), batch_size=batch_size)


def test_single_precision_gradient_of_one_step() -> None:
    """One step's gradient in float32 is the global batch's to 1e-6 of its largest entry."""
    recipe = Recipe(module=OneStep, loader=single, batch_size=16, max_steps=1)
    for outs in run_ranks(2, hetero_fit, recipe, {"shares": [5, 1]}):
        plain = plain_fit(recipe, 32)
        assert relative_error(torch.tensor(outs["seen"][0]), torch.tensor(plain["seen"][0])) <= 1e-6


def test_bf16_mixed_stays_close() -> None:
    """Under autocast the parameters stay as close as bfloat16 lets them."""
    recipe = Recipe(module=Single, loader=single, batch_size=16, precision="bf16-mixed", max_epochs=1)
    for outs in run_ranks(2, hetero_fit, recipe, {"shares": [5, 1]}):
        assert relative_error(outs["parameters"], plain_fit(recipe, 32)["parameters"]) <= 2e-2


def ddp_fit(recipe: Recipe) -> Any:
    from tests.trainer.fits import make_trainer, parameters_of

    module = recipe.module()
    make_trainer("ddp", torch.distributed.get_world_size(), **recipe.trainer).fit(
        module, recipe.loader(recipe.batch_size)
    )
    return parameters_of(module)


def test_plain_ddp_is_off_where_ranks_count_unequally() -> None:
    """The failure that the weights are for: with ignored targets DDP's mean of means is another gradient."""
    recipe = Recipe(module=partial(Classifier, ignore_index=0))
    plain = plain_fit(recipe, 12)
    assert relative_error(run_ranks(2, ddp_fit, recipe)[0], plain["parameters"]) > 1e-3
    assert (
        relative_error(run_ranks(2, quiet_fit, recipe, {"shares": [1, 1]})[0]["parameters"], plain["parameters"])
        <= EXACT
    )


def test_plain_ddp_spreads_the_nan_of_an_empty_rank() -> None:
    """The failure that masking is for: one rank whose targets are all ignored makes every parameter NaN under DDP."""
    recipe = Recipe(module=partial(MaskedMean, ignore_index=1), loader=partial(sized, 24), batch_size=1, max_epochs=1)
    assert bool(torch.isnan(run_ranks(2, ddp_fit, recipe)[0]).all())
    plain = plain_fit(recipe, 2)
    for outs in run_ranks(2, hetero_fit, recipe, {}):
        assert relative_error(outs["parameters"], plain["parameters"]) <= EXACT


def hidden_fit(names: list[str]) -> list[dict[str, Any]]:
    keep_counts_on_device()
    return [hetero_fit(HIDDEN[name], {"shares": [2, 1]}) for name in names]


HIDDEN = {
    "empty ranks": Recipe(
        module=partial(MaskedMean, ignore_index=1), loader=partial(sized, 24), batch_size=2, max_epochs=2
    ),
    "empty ranks, accumulation": Recipe(
        module=partial(MaskedMean, ignore_index=1), loader=partial(sized, 24), batch_size=2, accumulate_grad_batches=3
    ),
    "samples": Recipe(loader=partial(sized, 25)),
    "LBFGS": Recipe(module=Newton, max_epochs=1),
    "manual": Recipe(module=Manual),
}


def test_counts_that_only_the_device_knows() -> None:
    """Weights, masks and logged losses stay right when the host never learns the counts."""
    outs = run_ranks(2, hidden_fit, list(HIDDEN))
    for number, (name, recipe) in enumerate(HIDDEN.items()):
        plain = plain_fit(recipe, 2 * recipe.batch_size)
        for out in outs:
            assert relative_error(out[number]["parameters"], plain["parameters"]) <= EXACT, name
    logged = [out[0]["metrics"] for out in outs]
    assert logged[0]["step"] == pytest.approx(logged[1]["step"])
    assert not any(math.isnan(value) for values in logged for value in values.values()), logged


def test_global_batches_are_the_same_whatever_the_ranks() -> None:
    """With the same global batch and seed, one, two and three ranks train on the same samples in the same order."""
    recipe = Recipe(loader=shuffled, batch_size=6, max_epochs=3)
    runs = [
        run_ranks(1, hetero_fit, recipe, {"global_batch": 12}),
        run_ranks(2, hetero_fit, recipe, {"global_batch": 12, "shares": [3, 1]}),
        run_ranks(3, hetero_fit, recipe, {"global_batch": 12}),
    ]
    alone = merged(out["seen"] for out in runs[0])
    for run in runs[1:]:
        assert merged(out["seen"] for out in run) == alone
        for out in run:
            assert relative_error(out["parameters"], runs[0][0]["parameters"]) <= EXACT
    assert alone[0] != sorted(alone[0]), "the loader shuffles"


def shuffled(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(60), batch_size=batch_size, shuffle=True)


def test_a_data_set_of_one_sample() -> None:
    """A data set of one sample trains on two ranks: the other one borrows it."""
    recipe = Recipe(loader=partial(sized, 1), batch_size=1, max_epochs=3, module=Regression)
    plain = plain_fit(recipe, 2)
    for outs in run_ranks(2, hetero_fit, recipe, {}):
        assert relative_error(outs["parameters"], plain["parameters"]) <= EXACT
