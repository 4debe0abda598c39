"""What counts as a rank's compute time in real fits, by a clock that only this work advances.

Each rank's clock is replaced by a counter: loading a sample, training on it, an optimizer step, validating, saving, and
waiting for the other rank advance it by known amounts. So what is measured can be compared exactly.
"""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_hetero import HeteroStrategy
from lightning_hetero.device import step_timer
from lightning_hetero.exchange.groups import PendingRows, RankGroup
from lightning_hetero.planning.planner import PlanUpdate
from lightning_hetero.planning.reports import StepReports
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

LOAD, TRAIN, STEP, OTHER = 1.0, 10.0, 100.0, 10_000.0


class Clock:
    now = 0.0


class Loading(Numbers):
    def __getitem__(self, index: int) -> dict[str, Any]:
        Clock.now += LOAD
        return super().__getitem__(index)


class Optimizer(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        value = super().step(closure)
        Clock.now += STEP
        return value


class Worked(Regression):
    """Every sample takes the same; rank 1 is slower by half."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        Clock.now += TRAIN * len(batch["x"]) * (1.5 if self.global_rank == 1 else 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        Clock.now += OTHER

    def configure_optimizers(self) -> Any:
        return Optimizer(self.parameters(), lr=0.01)


class ByHand(Worked):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Buffered(Worked):
    """Has a buffer, which DDP may copy from rank 0 in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen_before", torch.zeros(1))


class Measuring(Worked):
    """Computes metrics over all ranks in its training step: states are summed, lists joined, or the user gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = torch.nn.ModuleList([MeanMetric(), CatMetric(), MeanMetric(dist_sync_fn=gather_all_tensors)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for metric in self.metrics:
            metric.update(batch["y"])
            metric.compute()
        return super().training_step(batch, batch_idx)


class Saves(Callback):
    """Takes its time after every batch, as saving a checkpoint does."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/pause.ckpt")
        Clock.now += OTHER


class Reports(Callback):
    """Keeps what all ranks report of their compute time."""

    def __init__(self) -> None:
        self.reported: list[tuple[list[float], list[float]]] = []

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        planner = trainer.strategy.job.planner_cache.current
        update = planner.update

        def observed(reports: StepReports) -> PlanUpdate:
            if reports.measured_steps.max() >= 0:
                self.reported.append((reports.measured_steps.tolist(), reports.compute_seconds.tolist()))
            return update(reports)

        planner.update = observed


def waiting_mean(state: Any, bucket: Any) -> Any:
    """A user's communication hook that returns when all ranks are there."""
    Clock.now += OTHER
    future = torch.futures.Future()
    buffer = bucket.buffer()
    torch.distributed.all_reduce(buffer)
    future.set_result(buffer / torch.distributed.get_world_size())
    return future


FITS: dict[str, tuple[type[Worked], dict[str, Any]]] = {
    "plain": (Worked, {}),
    "accumulation": (Worked, {"accumulate_grad_batches": 2}),
    "validation in between": (Worked, {"val_check_interval": 2}),
    "checkpoints in between": (Worked, {"callbacks": [Saves()], "max_epochs": 2}),
    "manual optimization": (ByHand, {}),
    "a hook that waits": (Worked, {"ddp_comm_hook": waiting_mean}),
    "rank 0's buffers in every step": (Buffered, {"broadcast_buffers": True}),
    "metrics in every step": (Measuring, {}),
}


def takes_long(function: Any) -> Any:
    """Like `function`, and meanwhile others are waited for."""

    def waits(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        Clock.now += OTHER
        return result

    return waits


def fit_all() -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # In this process, which ends with the test: waiting for messages, for the gradients of the others, and for whatever
    # is gathered, takes long.
    step_timer.perf_counter = lambda: Clock.now
    PendingRows.wait = takes_long(PendingRows.wait)
    step_timer.ComputeTimer.gradients_ready = takes_long(step_timer.ComputeTimer.gradients_ready)
    DistributedDataParallel._sync_buffers = takes_long(DistributedDataParallel._sync_buffers)
    RankGroup.gather = takes_long(RankGroup.gather)
    torch.distributed.all_gather = takes_long(torch.distributed.all_gather)
    reported = {}
    for name, (module, options) in FITS.items():
        of_ddp = {key: value for key, value in options.items() if key in ("ddp_comm_hook", "broadcast_buffers")}
        strategy = HeteroStrategy(shares=[3, 1], global_batch=8, bucket_cap_mb=1e-4, **of_ddp)
        more = {key: value for key, value in options.items() if key not in of_ddp}
        reports = Reports()
        more["callbacks"] = [*more.get("callbacks", []), reports]
        trainer = make_trainer(strategy, 2, **{"max_epochs": 1, "num_sanity_val_steps": 0} | more)
        loaders = {"train_dataloaders": DataLoader(Loading(8 * 6), batch_size=4)}
        if "val_check_interval" in options:
            loaders["val_dataloaders"] = DataLoader(Numbers(4), batch_size=2)
        trainer.fit(module(), **loaders)
        reported[name] = reports.reported
    return reported


@pytest.fixture(scope="module")
def reported() -> list[dict[str, Any]]:
    return run_ranks(2, fit_all)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("plain", 1.0),
        ("accumulation", 0.5),
        ("validation in between", 1.0),
        ("checkpoints in between", 1.0),
        ("manual optimization", 1.0),
        ("a hook that waits", 1.0),
        ("rank 0's buffers in every step", 1.0),
        ("metrics in every step", 1.0),
    ],
)
def test_compute_time_is_loading_training_and_the_optimizer(
    reported: list[dict[str, Any]], name: str, steps: float
) -> None:
    """Per micro-batch; nothing of what lies between batches, and nothing of the other rank."""
    expected = [
        6 * (LOAD + TRAIN) + steps * STEP,
        2 * (LOAD + 1.5 * TRAIN) + steps * STEP,
    ]
    measured = reported[0][name]
    assert len(measured) >= 2
    for measured_steps, seconds in measured:
        assert min(measured_steps) == max(measured_steps)
        assert seconds == pytest.approx(expected)
    assert reported[1][name] == measured
