"""On a CUDA GPU: all ranks share the first one, over gloo, since NCCL wants a GPU for each."""

import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import ConfusionMatrix

from tests.ranks import run_ranks
from tests.trainer.fits import (
    Joined,
    Numbers,
    Recipe,
    Regression,
    hetero_fit,
    make_trainer,
    parameters_of,
    plain_fit,
    relative_error,
)
from tests.trainer.modules import Classifier, Manual, MaskedMean, Newton, Single
from tests.trainer.test_sync_batch_norm import Normal, NormalMasked

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

EXACT = 1e-12


class OneGpu(Joined):
    """Each rank is a node of its own, whose only GPU is the machine's first."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return dist.get_rank()


def on_gpu(ranks: int) -> dict[str, Any]:
    return {"accelerator": "cuda", "devices": 1, "num_nodes": ranks, "plugins": [OneGpu()]}


def sized(size: int, batch_size: int, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    return DataLoader(Numbers(size, dtype=dtype), batch_size=batch_size)


NARROW = partial(sized, 64, dtype=torch.float32)


class Scaled(Single):
    """Its loss scale is so small that no step is skipped: which ones are depends on the weights of the ranks."""

    def on_fit_start(self) -> None:
        self.trainer.precision_plugin.scaler = torch.amp.GradScaler("cuda", init_scale=256.0)


RECIPES = {
    "mean, short last batch": (Recipe(loader=partial(sized, 49)), EXACT),
    "accumulation, clipping": (Recipe(accumulate_grad_batches=3, gradient_clip_val=0.1), EXACT),
    "class weights, ignored targets": (Recipe(module=partial(Classifier, [0.1, 3.0, 0.7, 1.3], ignore_index=2)), EXACT),
    "empty ranks whose gradients are NaN": (
        Recipe(module=partial(MaskedMean, ignore_index=1), loader=partial(sized, 24), batch_size=2),
        EXACT,
    ),
    "the same, accumulation": (
        Recipe(
            module=partial(MaskedMean, ignore_index=1),
            loader=partial(sized, 24),
            batch_size=2,
            accumulate_grad_batches=2,
        ),
        EXACT,
    ),
    "manual optimization": (Recipe(module=Manual), EXACT),
    "LBFGS": (Recipe(module=Newton, max_epochs=1), 1e-9),
    "bfloat16": (Recipe(module=Single, loader=NARROW, batch_size=16, precision="bf16-mixed"), 2e-2),
    "half precision with a loss scale": (
        Recipe(module=Scaled, loader=NARROW, batch_size=16, precision="16-mixed", gradient_clip_val=1.0),
        5e-3,
    ),
}


def fit_all(strategy: dict[str, Any]) -> list[dict[str, Any]]:
    warnings.filterwarnings("ignore", message="nothing in a global batch")
    outs = []
    for recipe, _ in RECIPES.values():
        recipe.trainer |= on_gpu(dist.get_world_size())
        outs.append(hetero_fit(recipe, strategy))
    return outs


def alone_on_gpu(recipe: Recipe, global_batch: int) -> Any:
    kept = recipe.trainer
    recipe.trainer = kept | {"accelerator": "cuda", "devices": 1}
    try:
        return plain_fit(recipe, global_batch)
    finally:
        recipe.trainer = kept


@pytest.mark.parametrize(("world_size", "strategy"), [(1, {}), (2, {"shares": [4, 1]}), (3, {"shares": "auto"})])
def test_parameters_end_as_in_one_process(world_size: int, strategy: dict[str, Any]) -> None:
    """Counts and weights stay on the device, and masks are applied there: the sum is the same as on one rank."""
    ranks = run_ranks(world_size, fit_all, strategy)
    for number, (name, (recipe, tolerance)) in enumerate(RECIPES.items()):
        plain = alone_on_gpu(recipe, recipe.batch_size * world_size)
        for rank, outs in enumerate(ranks):
            error = relative_error(outs[number]["parameters"], plain["parameters"])
            assert error <= tolerance, f"{name}: rank {rank} is off by {error:.1e}"
            assert outs[number]["step"] == plain["step"], name


NORMALIZED = {
    "short last batch": Recipe(module=Normal, loader=partial(sized, 46), batch_size=4, sync_batchnorm=True),
    "empty ranks whose gradients are NaN": Recipe(
        module=NormalMasked, loader=partial(sized, 24), batch_size=2, sync_batchnorm=True
    ),
}


def fit_normalized() -> list[Any]:
    warnings.filterwarnings("ignore", message="nothing in a global batch")
    outs = []
    for recipe in NORMALIZED.values():
        recipe.trainer |= on_gpu(2)
        outs.append(hetero_fit(recipe, {"shares": [3, 1]})["seen"])
    return outs


def test_synchronized_batch_norm_ends_as_in_one_process() -> None:
    ranks = run_ranks(2, fit_normalized)
    for number, (name, recipe) in enumerate(NORMALIZED.items()):
        recipe.trainer.pop("sync_batchnorm", None)
        plain = alone_on_gpu(recipe, 2 * recipe.batch_size)["seen"]
        for outs in ranks:
            error = relative_error(*(torch.tensor(v[0][0], dtype=torch.float64) for v in (outs[number], plain)))
            assert error <= EXACT, f"{name}: off by {error:.1e}"


class Overflows(Regression):
    """In step 2 the loss of rank 1 is too large for half precision."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        self.scales: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 2 and dist.get_rank() == 1 else loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def fit_overflow() -> Any:
    from lightning_hetero import HeteroStrategy

    module = Overflows()
    trainer = make_trainer(
        HeteroStrategy(shares=[3, 1]), **on_gpu(2), precision="16-mixed", max_epochs=1, limit_train_batches=5
    )
    trainer.fit(module, NARROW(8))
    return parameters_of(module), module.scales


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    """Gradients are averaged before they are looked at, so all ranks see the infinity and lower the scale alike."""
    (one, scales), (other, their_scales) = run_ranks(2, fit_overflow)
    assert torch.equal(one, other)
    assert bool(torch.isfinite(one).all())
    assert scales == their_scales
    assert scales[2] == scales[1] / 2


MIB = 2**20


class Filling(Regression):
    """Holds 8 MiB a sample; rank 1 may have 256 MiB more than it has at the start."""

    def on_train_start(self) -> None:
        if dist.is_initialized() and dist.get_rank() == 1:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 256 * MIB) / total)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch["x"]).squeeze(-1)
        much = (out[:, None] * torch.ones(MIB, dtype=torch.float64, device=self.device)).sin()
        return F.mse_loss(out + much.mean(-1), batch["y"])


FILLING = Recipe(module=Filling, loader=partial(sized, 96), batch_size=12, max_epochs=1)


def fit_filling() -> Any:
    from lightning_hetero import HeteroStrategy

    module, chosen = Filling(), HeteroStrategy(shares=[1, 2])
    trainer = make_trainer(chosen, **on_gpu(2), max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, FILLING.loader(12))
    plans = [plan.local_batches for plan in chosen.job.planner_cache.current.schedule.plans]
    return parameters_of(module), plans, [str(w.message) for w in caught if "memory" in str(w.message)]


def test_a_gpu_that_runs_out_of_memory() -> None:
    """CUDA's own error; the batch is computed in parts, and the rank gets fewer samples from then on."""
    ranks = run_ranks(2, fit_filling)
    plain = alone_on_gpu(FILLING, 24)
    assert ranks[0][1][0] == (8, 16)
    assert ranks[0][1][-1][1] < 16
    assert "ran out of memory" in ranks[0][2][0]
    for parameters, plans, _ in ranks:
        assert plans == ranks[0][1]
        assert relative_error(parameters, plain["parameters"]) <= EXACT


class Heavy(Regression):
    """Ten times as much to compute for each sample on rank 1."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch["x"].repeat_interleave(128, 0).repeat(1, 200)
        for _ in range(30 if dist.get_rank() == 1 else 3):
            x = (x @ torch.ones(1000, 1000, device=self.device)).tanh()
        loss = F.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss + 0 * x.sum()


def fit_heavy() -> Any:
    from lightning_hetero import HeteroStrategy

    chosen = HeteroStrategy()
    trainer = make_trainer(chosen, **on_gpu(2), max_epochs=1)
    trainer.fit(Heavy(), sized(64 * 60, 32, torch.float32))
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return [plan.local_batches for plan in chosen.job.planner_cache.current.schedule.plans], values


def test_the_plan_follows_what_the_device_measures() -> None:
    """The host queues a step long before the GPU comes to it: only the GPU's own events tell that rank 1 has more."""
    (plans, values), (others, other_values) = run_ranks(2, fit_heavy)
    assert plans == others
    assert plans[-1][0] > 2 * plans[-1][1], plans
    assert values == other_values


class Sees(Single):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)
        self.confusion = ConfusionMatrix(task="multiclass", num_classes=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.confusion.update(self.net(batch["x"]), batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.matrix = self.confusion.compute().tolist()


def validate() -> Any:
    from lightning_hetero import HeteroStrategy

    module = Sees()
    make_trainer(HeteroStrategy(shares=[3, 1]), **on_gpu(2)).validate(module, sized(61, 8, torch.float32))
    return module.matrix


def test_evaluation_counts_each_sample_once() -> None:
    module = Sees()
    make_trainer("auto", 1).validate(module, sized(61, 8, torch.float32))
    assert sum(map(sum, module.matrix)) == 61
    assert run_ranks(2, validate) == [module.matrix] * 2


# ---- nothing waits for the device that does not do so under DDP ----

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Counted(Callback):
    """What torch's profiler sees of `STEPS` steps."""

    FIRST, STEPS = 20, 20

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.FIRST:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            )
            self._profiler.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.FIRST + self.STEPS - 1:
            self._profiler.stop()
            self.calls = Counter(event.name for event in self._profiler.events())


class Segments(Single):
    """Ignored targets, so that only the device knows the loss count."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 256), nn.ReLU(), nn.Linear(256, 4))
        self.criterion = nn.CrossEntropyLoss(ignore_index=1)

    def loss_count(self, batch: Any) -> Any:
        from lightning_hetero import cross_entropy_count

        return cross_entropy_count(self.criterion, batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self.net(batch["x"]), batch["label"])


def count_calls(kind: str, folder: str) -> dict[str, int]:
    dist.destroy_process_group()
    dist.init_process_group("nccl", init_method=f"file://{Path(folder) / kind}", rank=0, world_size=1)
    from lightning_hetero import HeteroStrategy

    strategy = HeteroStrategy() if kind == "hetero" else "ddp"
    counted = Counted()
    warnings.simplefilter("ignore")  # the profiler's
    trainer = make_trainer(strategy, **on_gpu(1), max_epochs=1, callbacks=[counted])
    trainer.fit(Segments(), sized(64 * 45, 64, torch.float32))
    return dict(counted.calls)


def test_no_step_waits_for_the_device_where_plain_ddp_does_not(tmp_path: Path) -> None:
    calls = {kind: run_ranks(1, count_calls, kind, str(tmp_path))[0] for kind in ("ddp", "hetero")}
    assert calls["ddp"]["cudaLaunchKernel"] > Counted.STEPS, "the profiler sees what the host asks CUDA for"
    for name in WAITS:
        # The profiler itself synchronizes when it stops; the same on both sides.
        assert calls["hetero"].get(name, 0) <= calls["ddp"].get(name, 0), (name, calls)
