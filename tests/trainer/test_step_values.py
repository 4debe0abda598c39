"""Step values: of the global batch, the same on all ranks, in every step."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_hetero import HeteroStrategy
from lightning_hetero.trainer.logged_values import LoggedKey
from lightning_hetero.trainer.step_values import StepValues
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer, parameters_of, plain_loader
from tests.trainer.loading import once

# ---- between messages ----


class Device:
    """A clock of a device that the test lets pass the points one by one."""

    def __init__(self) -> None:
        self.points, self.passed = 0, 0

    def now(self) -> int:
        self.points += 1
        return self.points

    def has_passed(self, point: int) -> bool:
        return point <= self.passed

    def seconds(self, start: int, end: int) -> float:
        raise AssertionError("values need no time")


KEY = LoggedKey(
    "training_step.loss", _Metadata("training_step", "loss", on_step=True), "mean", is_tensor=True, sync_dist=False
)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=6))
def test_values_are_complete_once_all_ranks_have_sent_theirs(delays: list[list[int]]) -> None:
    """Whatever each rank's device is behind by: all find the same steps complete, in order, with all rows."""
    world_size, steps = len(delays), 12
    ranks = [StepValues(Device(), world_size) for _ in delays]  # type: ignore[arg-type]
    found: list[list[tuple[int, list[float]]]] = [[] for _ in delays]
    waiting: list[list[list[float]]] = [[] for _ in delays]
    for step in range(1, steps + 1):
        table = []
        for rank, values in enumerate(ranks):
            values.add(KEY.key, torch.tensor(10.0 * step + rank), 2.0, step)
            values.end_step(step, [values.row(KEY)])
            waiting[rank].append(values.message(1))
            late = delays[rank][step % len(delays[rank])]
            table.append(waiting[rank].pop(0) if len(waiting[rank]) > late else [0.0] * 5)
        for rank, values in enumerate(ranks):
            complete = values.receive(np.array(table))
            if complete is not None:
                found[rank].append((complete[0], complete[1][0, :, 2].tolist()))
    assert all(one == found[0] for one in found)
    assert [step for step, _ in found[0]] == sorted({step for step, _ in found[0]})
    for step, sums in found[0]:
        assert sums == [2 * (10.0 * step + rank) for rank in range(world_size)]


def test_a_key_that_was_added_since_has_no_row_yet() -> None:
    values = StepValues(Device(), 1)  # type: ignore[arg-type]
    values.add(KEY.key, torch.tensor(3.0), 1.0, 1)
    values.end_step(1, [values.row(KEY)])
    message = values.message(2)
    assert message == [1.0, 1.0, 4.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    complete = values.receive(np.array([message]))
    assert complete is not None
    assert complete[1].shape == (2, 1, 4)
    assert values.message(2) == [0.0] * 9, "nothing is sent twice"


# ---- in a training ----


class Reads(Callback):
    """Reads what was logged after each step, as a callback that decides by it does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Logs(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.f1 = MulticlassF1Score(4, average="macro")
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True)
        self.f1(batch["x"][:, :4], batch["label"])
        self.log("f1", self.f1, on_step=True, on_epoch=True)
        self.mean(batch["y"])
        self.log("mean", self.mean, on_step=True)
        if batch_idx == 2:
            self.log("late", float(batch_idx), on_step=True)
        return loss


def reading(shares: list[int] | None, every: int) -> list[dict[str, float]]:
    reads, size = Reads(), 6 if shares else 12
    trainer = make_trainer(
        HeteroStrategy(shares=shares) if shares else "auto",
        len(shares or [0]),
        callbacks=[reads],
        max_epochs=2,
        log_every_n_steps=every,
    )
    trainer.fit(Logs(), plain_loader(size))
    return reads.seen


@once
def read(every: int) -> tuple[list[Any], Any]:
    return run_ranks(2, reading, [3, 1], every), run_ranks(1, reading, None, every)[0]


def test_what_was_logged_is_there_after_every_step() -> None:
    """It is that of the step before, and the same on all ranks; where ranks exchange it is that of the step.

    They do in the first step, each fourth, the last of an epoch, and those in which they log a key for the first time.
    """
    (first, second), one = read(4)
    assert first == second
    assert len(first) == len(one) == 12
    for step, (found, expected) in enumerate(zip(first, one, strict=True)):
        used = step == 0 or (step + 1) % 4 == 0 or step % 6 == 5 or step == 2  # with a new key
        before = one[step if used else step - 1]
        assert found["loss"] == pytest.approx(before["loss"], rel=1e-12), step
        assert found["mean"] == pytest.approx(before["mean"], rel=1e-6), step
        assert {"f1", "f1_step"} <= set(found)
        if used:
            assert found["f1_step"] == pytest.approx(expected["f1_step"], rel=1e-6), step
        assert ("late" in found) == (step >= 2)


def test_a_metrics_step_value_is_that_of_the_global_batch() -> None:
    (first, second), one = read(1)
    assert first == second
    for found, expected in zip(first, one, strict=True):
        for name in ("loss", "f1_step", "mean"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


# ---- who decides by it ----


class Plateau(Regression):
    """Lowers the learning rate by the accuracy of each step, a metric object."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4).double()
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.head(batch["x"])
        self.accuracy(logits, batch["label"])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx) + nn.functional.cross_entropy(logits, batch["label"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.7)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "accuracy", "reduce_on_plateau": True}
        return {"optimizer": optimizer, "lr_scheduler": config}


def plateau(shares: list[int] | None) -> tuple[float, Any]:
    torch.manual_seed(4)
    module = Plateau()
    trainer = make_trainer(HeteroStrategy(shares=shares) if shares else "auto", len(shares or [0]), log_every_n_steps=1)
    trainer.fit(module, DataLoader(Numbers(61), batch_size=6 if shares else 12))
    return trainer.optimizers[0].param_groups[0]["lr"], parameters_of(module)


def test_a_learning_rate_that_follows_a_metric_is_that_of_one_process() -> None:
    (rate, parameters) = run_ranks(1, plateau, None)[0]
    assert rate < 0.1
    for own_rate, own in run_ranks(2, plateau, [3, 1]):
        assert own_rate == rate
        torch.testing.assert_close(own, parameters, rtol=1e-10, atol=1e-12)
