"""A rank that runs out of memory computes its batch in parts: nothing is lost or done twice, its share is capped."""

import resource
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, make_trainer, merged, parameters_of, relative_error
from tests.trainer.modules import Classifier, Manual, MaskedMean, Newton, Normalized, Unused

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


class LimitedMemory(nn.Module):
    """Runs out of memory with more than `fits` samples on rank 1, in the step `at` or always."""

    def __init__(self, fits: int, where: str, at: int | None, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.fits, self.where, self.at, self.ranks = fits, where, at, ranks
        self.step = -1
        self.tries: list[tuple[int, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tries.append((self.step, len(x)))
        hit = torch.distributed.is_initialized() and torch.distributed.get_rank() in self.ranks
        if not hit or len(x) <= self.fits or self.at not in (None, self.step):
            return x
        if self.where == "forward":
            torch.empty(HUGE, dtype=torch.uint8)
        return _Breaks.apply(x)


def memory_limited(
    make: Callable[[], Any] = Regression,
    *,
    fits: int = 4,
    where: str = "forward",
    at: int | None = None,
    ranks: tuple[int, ...] = (1,),
) -> Any:
    """A module whose network needs more memory than there is for more than `fits` samples.

    A layer at its front breaks last on the way back: the gradients of the others are there already.
    """
    module = make()
    module.limited = LimitedMemory(fits, where, at, ranks)
    module.net = nn.Sequential(*module.net[:1], module.limited, *module.net[1:])
    return module


class Held(Callback):
    """What each step of a rank was given, as Lightning sees it."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.limited.step = len(self.indices)
        self.indices.append(batch["index"].tolist())


def fit_here(recipe: Recipe, strategy: Any, devices: int, batch_size: int) -> dict[str, Any]:
    module, held = recipe.module(), Held()
    trainer = make_trainer(strategy, devices, callbacks=[held], **recipe.trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, recipe.loader(batch_size))
    return {
        "parameters": parameters_of(module),
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "held": held.indices,
        "tries": module.limited.tries,
        "warned": [str(w.message) for w in caught if "memory" in str(w.message)],
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
    }


def fit(recipe: Recipe, strategy: dict[str, Any]) -> dict[str, Any]:
    """Shares are equal unless said otherwise: with "auto", a probe on a busy machine may find the ranks unequal."""
    from lightning_hetero import HeteroStrategy

    chosen = HeteroStrategy(**({"shares": "equal"} | strategy))
    out = fit_here(recipe, chosen, torch.distributed.get_world_size(), recipe.batch_size)
    plans = [
        (plan.first_step, plan.local_batches, plan.reason) for plan in chosen.job.planner_cache.current.schedule.plans
    ]
    return out | {"plans": plans}


def sized(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


class Ignoring(MaskedMean):
    """Loss and gradients are NaN for a part of which all is ignored."""

    def __init__(self) -> None:
        super().__init__(ignore_index=1)


class Constant(Regression):
    """The counts of parts don't add up to that of the batch."""

    def loss_count(self, batch: Any) -> float:
        return 5.0


class Weighted(Classifier):
    def __init__(self) -> None:
        super().__init__(weight=[0.1, 3.0, 0.7, 1.3], ignore_index=2)


RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    f"{name}, {where}": (
        Recipe(module=partial(memory_limited, make, where=where, **limited), loader=partial(sized, 64), **trainer),
        options,
    )
    for where in ("forward", "backward")
    for name, make, limited, trainer, options in (
        ("mean", Regression, {}, {}, {}),
        ("down to one sample, ignored ones among them", Ignoring, {"fits": 1}, {}, {"shares": [3, 1]}),
        ("class weights", Weighted, {"fits": 2}, {}, {}),
        ("counts that do not add up", Constant, {"fits": 3}, {"limit_train_batches": 1}, {"shares": [1, 1]}),
        ("accumulation", Regression, {}, {"accumulate_grad_batches": 3}, {}),
        ("a later micro-batch", Regression, {"at": 1}, {"accumulate_grad_batches": 3}, {}),
        ("the last micro-batch", Regression, {"at": 1}, {"accumulate_grad_batches": 2}, {}),
        ("clipping", Regression, {}, {"gradient_clip_val": 0.1}, {}),
        ("several closures", Newton, {}, {"max_epochs": 1}, {}),
        ("static graph", Regression, {"at": 1}, {}, {"static_graph": True}),
        ("views of buckets", Regression, {"at": 1}, {"accumulate_grad_batches": 2}, {"gradient_as_bucket_view": True}),
    )
}


def fit_all(names: list[str]) -> list[dict[str, Any]]:
    return [fit(RECIPES[name][0], {"shares": "equal"} | RECIPES[name][1]) for name in names]


def test_parameters_end_as_in_one_process_and_every_sample_is_trained_on_once() -> None:
    """Fails if a part's weight, an earlier micro-batch or the average over ranks is lost, or counted twice."""
    names = list(RECIPES)
    ranks = run_ranks(2, fit_all, names)
    for number, name in enumerate(names):
        recipe = RECIPES[name][0]
        plain = fit_here(recipe, "auto", 1, 12)
        outs = [rank[number] for rank in ranks]
        assert merged(out["held"] for out in outs) == plain["held"], name
        for rank, out in enumerate(outs):
            error = relative_error(out["parameters"], plain["parameters"])
            assert error <= EXACT, f"{name}: rank {rank} is off by {error:.1e}"
            assert out["step"] == plain["step"], name
        assert len(outs[0]["warned"]) == 1, name
        assert not outs[1]["warned"], "only rank 0 warns, and once"
        assert outs[0]["plans"] == outs[1]["plans"], name


def test_the_share_is_capped_at_once_and_the_others_take_the_surplus() -> None:
    recipe = Recipe(module=partial(memory_limited, fits=5), loader=partial(sized, 200), batch_size=12)
    ranks = run_ranks(3, fit, recipe, {"shares": [1, 1, 1]})
    plans = ranks[0]["plans"]
    assert plans[0] == (0, (12, 12, 12), "shares")
    assert plans[1] == (2, (17, 3, 16), "memory"), "12 are cut in 6 + 6, and these in 3 each; step 1 was drawn already"
    assert len(plans) == 2
    tries = [size for step, size in ranks[1]["tries"] if step >= 2]
    assert max(tries) == 3
    assert [size for step, size in ranks[1]["tries"] if step == 0] == [12, 6, 3, 3, 3, 3], "none is tried in vain twice"
    assert [size for step, size in ranks[1]["tries"] if step == 1] == [6, 3, 3, 3, 3], "12 are known to be too many"
    assert "rank 1 (cpu) ran out of memory" in ranks[0]["warned"][0]
    assert "at most 3 samples" in ranks[0]["warned"][0]


def test_what_fits_is_not_forgotten_where_a_smaller_batch_is_cut() -> None:
    """Step 1 was drawn already: its 5 may fit, and are cut in 3 and 2, which shows nothing new about the 4."""
    recipe = Recipe(module=memory_limited, loader=partial(sized, 26), batch_size=8)
    ranks = run_ranks(2, fit, recipe, {"shares": [1, 1]})
    assert [size for step, size in ranks[1]["tries"] if step <= 1] == [8, 4, 4, 5, 3, 2]
    assert [plan[1] for plan in ranks[0]["plans"]] == [(8, 8), (12, 4)]
    assert len(ranks[0]["warned"]) == 1


class Lopsided(LimitedMemory):
    """Rank 0 holds 5 samples, and rank 1 holds 7."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.distributed.is_initialized():
            self.fits = (5, 7)[torch.distributed.get_rank()]
        return super().forward(x)


def lopsided() -> Any:
    module = memory_limited(ranks=(0, 1))
    module.limited.__class__ = Lopsided
    return module


def test_what_just_fits_is_found() -> None:
    """Halves of 6 and of 9 fit, and are too little for a global batch of 12: what lies between is tried."""
    recipe = Recipe(module=lopsided, loader=partial(sized, 144), batch_size=6, max_epochs=1)
    ranks = run_ranks(2, fit, recipe, {"shares": [1, 1]})
    plain = fit_here(recipe, "auto", 1, 12)
    assert ranks[0]["plans"][-1][1] == (5, 7)
    for out in ranks:
        assert relative_error(out["parameters"], plain["parameters"]) <= EXACT


def test_exploration_never_goes_beyond_what_memory_allows() -> None:
    """Rank 1 is as fast as rank 0 and would soon be given more."""
    recipe = Recipe(module=partial(memory_limited, fits=8), loader=partial(sized, 400), batch_size=16, max_epochs=1)
    ranks = run_ranks(2, fit, recipe, {"shares": "auto"})
    assert all(plan[1][1] <= 8 for plan in ranks[0]["plans"] if plan[0] > 0)


class Logging(Regression):
    """Logs in all ways that there are, before and after what runs out of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric().double()
        self.norm = nn.BatchNorm1d(5, affine=False).double()
        self.after: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch["x"], batch["y"]
        self.norm(x)
        self.mean.update(x.sum(-1))
        self.log("before", y.mean(), on_step=True, on_epoch=True, sync_dist=True, batch_size=len(y))
        out = self.net(x).squeeze(-1)
        loss = F.mse_loss(out, y)
        self.log_dict(
            {"loss": loss, "bare": y.mean()}, on_step=False, on_epoch=True, sync_dist=True
        )  # Lightning looks the batch size up
        self.log("sum", y.sum(), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("most", y.max(), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        return {"loss": loss, "out": out}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert len(outputs["out"]) == len(batch["x"])
        self.after.append(float(outputs["loss"]))


def log_all() -> Any:
    outs = []
    for where in ("forward", "backward"):
        recipe = Recipe(
            module=partial(memory_limited, Logging, fits=4, where=where), loader=partial(sized, 60), max_epochs=1
        )
        outs.append(fit(recipe, {"shares": [1, 1]}))
    return outs


def test_what_is_logged_counts_every_sample_once() -> None:
    """Fails if parts are logged one by one, twice, or with an exchange each, which the others would not make."""
    ranks = run_ranks(2, log_all)
    recipe = Recipe(module=partial(memory_limited, Logging), loader=partial(sized, 60), max_epochs=1)
    plain = fit_here(recipe, "auto", 1, 12)
    for out in (*ranks[0], *ranks[1]):
        assert set(out["metrics"]) == set(plain["metrics"])
        for key, value in plain["metrics"].items():
            assert out["metrics"][key] == pytest.approx(value, rel=1e-5), key


def buffers_after(where: str, fits: int) -> Any:
    recipe = Recipe(
        module=partial(memory_limited, Logging, fits=fits, where=where), loader=partial(sized, 12), max_epochs=1
    )
    return fit(recipe, {"shares": [1, 1], "broadcast_buffers": False})["buffers"]


def test_a_backward_pass_in_parts_leaves_no_trace_in_buffers() -> None:
    """The forward pass on all samples was done, and has updated BatchNorm's statistics once."""
    whole, cut = (run_ranks(2, buffers_after, "backward", fits)[1] for fits in (100, 4))
    assert whole["norm.num_batches_tracked"] == 1
    for name, buffer in whole.items():
        assert torch.equal(buffer, cut[name]), name


def test_parts_of_a_batch_norm_have_two_samples() -> None:
    """4 samples are cut in 2 and 2, and then no further."""
    recipe = Recipe(
        module=partial(memory_limited, Normalized, fits=2), loader=partial(sized, 40), batch_size=4, max_epochs=1
    )
    ranks = run_ranks(2, fit, recipe, {"shares": [1, 1]})
    assert [size for step, size in ranks[1]["tries"] if step == 0] == [4, 2, 2]
    assert ranks[0]["plans"][-1][1] == (6, 2)
    recipe.module = partial(memory_limited, Normalized, fits=1)
    errors = fails_on_ranks(2, fit, recipe, {"shares": [1, 1]})
    assert "rank 1 (cpu) ran out of memory at a local batch of 4, and 2 of its samples alone do not fit" in errors[1]


class Filling(Regression):
    """Really allocates: 16 MiB a sample twice in the forward pass, and more on the way back.

    Rank 1 may have 512 MiB of addresses more than it has at its first batch; its 18 samples need 576 to go forward.
    """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + 512 * 2**20, resource.RLIM_INFINITY))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch["x"]).squeeze(-1)
        much = (out[:, None] * torch.ones(2**21, dtype=torch.float64)).sin()
        return F.mse_loss(out + much.mean(-1), batch["y"])


FILLING = Recipe(
    module=partial(memory_limited, Filling, fits=100), loader=partial(sized, 72), batch_size=12, max_epochs=1
)


def test_a_rank_whose_system_gives_it_no_more_memory() -> None:
    ranks = run_ranks(2, fit, FILLING, {"shares": [1, 3]})
    plain = fit_here(FILLING, "auto", 1, 24)
    assert ranks[0]["plans"][0][1] == (6, 18)
    assert ranks[0]["plans"][-1][1][1] < 18
    assert "ran out of memory" in ranks[0]["warned"][0]
    for out in ranks:
        assert relative_error(out["parameters"], plain["parameters"]) <= EXACT


# ---- what ends the run ----


def test_a_global_batch_that_fits_nowhere() -> None:
    """Both ranks can hold 3: the sum is known after two steps, and both raise the same error."""
    errors = fails_on_ranks(2, fit, Recipe(module=partial(memory_limited, fits=3, ranks=(0, 1))), {})
    for rank in (0, 1):
        assert "ValueError: a global batch of 12 does not fit into memory: 6 samples too many" in errors[rank]
        assert "use a global batch of at most 6" in errors[rank]


def test_one_rank_alone_has_nobody_to_take_the_rest() -> None:
    errors = fails_on_ranks(1, fit, Recipe(module=partial(memory_limited, fits=3, ranks=(0,))), {})
    assert "a global batch of 6 does not fit into memory: 3 samples too many" in errors[0]


def test_a_limit_below_what_a_process_holds_already() -> None:
    errors = fails_on_ranks(2, fit, Recipe(module=memory_limited), {"shares": "auto", "memory_limit": 2.0**20})
    for rank in (0, 1):
        assert "does not fit into memory" in errors[rank] or "does not hold the smallest local batch" in errors[rank]


def test_one_sample_that_does_not_fit() -> None:
    errors = fails_on_ranks(2, fit, Recipe(module=partial(memory_limited, fits=0)), {})
    assert (
        "RankOutOfMemoryError: rank 1 (cpu) ran out of memory at a local batch of 6, and 1 of its samples alone do not "
        "fit; use a smaller global_batch"
    ) in errors[1]
    assert "rank 1 (cpu) failed first" in errors[0]


class Changing(Regression):
    """Its batch holds something that is not one a sample."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"prior": torch.zeros(3)}


def test_a_batch_that_can_not_be_cut() -> None:
    errors = fails_on_ranks(2, fit, Recipe(module=partial(memory_limited, Changing)), {})
    assert "its batch can't be cut into parts: a tensor of shape (3,) is in it, and not 6 entries long" in errors[1]


def test_manual_optimization_is_named() -> None:
    errors = fails_on_ranks(2, fit, Recipe(module=partial(memory_limited, Manual)), {})
    assert (
        "rank 1 (cpu) ran out of memory at a local batch of 6, and in manual optimization a step can't be" in errors[1]
    )


def test_unused_parameters_are_named() -> None:
    """DDP counts what is used also in passes that go past its wrapper, and would expect it in the next step."""
    errors = fails_on_ranks(2, fit, Recipe(module=partial(memory_limited, Unused)), {"find_unused_parameters": True})
    assert "ran out of memory at a local batch of 6, and with find_unused_parameters a step can't be" in errors[1]


def test_memory_that_others_take_later_ends_the_run() -> None:
    """In step 3 the local batch is no larger than before: no rank is prepared to wait."""
    errors = fails_on_ranks(2, fit, Recipe(module=partial(memory_limited, at=3)), {"shares": [1, 1]})
    assert (
        "ran out of memory at a local batch of 6, and it has computed as many samples in an earlier step" in errors[1]
    )
