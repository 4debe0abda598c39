"""What is logged, and what a step leaves behind, where a rank has nothing of its own to add."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, make_trainer, plain_fit
from tests.trainer.modules import Classifier, Normalized


def sized(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


class Measured(Regression):
    """Logs its loss and a metric, with BatchNorm and dropout on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.drop = nn.Dropout(0.5)
        self.mean = MeanMetric()
        self.group = MetricCollection([MulticlassAccuracy(4), MulticlassConfusionMatrix(4)])
        self.states: list[Any] = []

    def _state(self) -> Any:
        return (
            [b.clone() for b in self.norm.buffers()],
            float(self.mean.mean_value),
            float(self.mean.weight),
            {name: metric._update_count for name, metric in self.group.items()},
            self.group["MulticlassConfusionMatrix"].confmat.clone(),
            torch.get_rng_state(),
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["index"].tolist())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(self.drop(self.norm(batch["x"]))).squeeze(-1)
        loss = F.mse_loss(out, batch["y"])
        self.mean.update(batch["x"].sum(-1).float())
        self.group.update(batch["x"][:, :4], batch["label"])
        self.log("each", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch["x"]))
        self.log("sum", batch["y"].sum(), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("most", batch["y"].max(), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="max")
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append(self._state())


def borrowing_fit(size: int, shares: Any) -> Any:
    from lightning_hetero import HeteroStrategy

    module = Measured()
    trainer = make_trainer(HeteroStrategy(shares=shares), 2, max_epochs=1)
    trainer.fit(module, sized(size, 6))
    return module.seen, module.states, {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_a_borrowed_step_leaves_no_trace() -> None:
    """25 samples in batches of 12, at least 2 a rank: in the last step rank 1 borrows, and nothing of it remains."""
    ranks = run_ranks(2, borrowing_fit, 26, [1, 1])
    (seen0, _, logged0), (seen1, states1, logged1) = ranks
    assert len(seen0[2]) == 2
    assert seen1[2] == seen0[2], "rank 1 has borrowed rank 0's samples"
    before, after = states1[1], states1[2]
    for old, new in zip(before[0][:2], after[0][:2], strict=True):
        assert torch.equal(old, new), "BatchNorm's statistics"
    assert after[0][2] == before[0][2] + 1, "steps are counted on all ranks alike"
    assert before[1:3] == after[1:3], "torchmetrics' states"
    assert before[3] == after[3], "torchmetrics' updates"
    assert torch.equal(before[4], after[4])
    assert torch.equal(before[5], after[5]), "the random state: dropout drew, and it was put back"
    data = Numbers(26)
    assert logged0 == pytest.approx(logged1)
    assert logged0["sum"] == pytest.approx(float(data.y.sum())), "borrowed samples are not added"
    assert logged0["most_epoch"] == pytest.approx(float(data.y.max()))


def test_random_states_differ_without_borrowing() -> None:
    """The check above can fail: in an ordinary step dropout does move the random state."""
    _, states, _ = run_ranks(2, borrowing_fit, 24, [1, 1])[1]
    assert not torch.equal(states[0][5], states[1][5])
    assert not torch.equal(states[0][0][0], states[1][0][0])


class Idiomatic(Regression):
    """Calls a metric on predictions that still hang in the graph, and logs means over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError().double()
        self.all = CatMetric().double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prediction = self.net(batch["x"]).squeeze(-1)
        self.error(prediction, batch["y"])
        self.all(prediction)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log("target", batch["y"].mean(), on_step=False, on_epoch=True, sync_dist=True)
        return F.mse_loss(prediction, batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_target", batch["y"].mean(), sync_dist=True)


def idiomatic_fit() -> tuple[dict[str, float], int]:
    from lightning_hetero import HeteroStrategy

    module = Idiomatic()
    trainer = make_trainer(HeteroStrategy(shares=[5, 2, 1]), 3, max_epochs=1)
    trainer.fit(module, sized(55, 6), sized(25, 6))
    return {k: float(v) for k, v in trainer.callback_metrics.items()}, len(module.all.value)


def test_means_over_uneven_ranks_and_metrics_in_a_graph() -> None:
    """55 samples on 3 ranks, the last one borrowed by two: means are those of the data, and metrics survive."""
    outs = run_ranks(3, idiomatic_fit)
    for logged, _ in outs:
        assert logged["target"] == pytest.approx(float(Numbers(55).y.mean()))
        assert logged["val_target"] == pytest.approx(float(Numbers(25).y.mean()))


class Logs(Classifier):
    """Logs its loss in every way."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        loss = self.criterion(self.net(batch["x"]), batch["label"])
        n = len(batch["x"])
        self.log("epoch", loss, on_step=False, on_epoch=True, batch_size=n, sync_dist=True)
        self.log("step", loss, on_step=True, on_epoch=False, batch_size=n, sync_dist=True)
        self.log("own", loss, on_step=True, on_epoch=True, batch_size=n)
        return loss


class Finite(Logs):
    """Its loss over nothing is 0, not NaN, as many write it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        inner = self.criterion
        self.valid = nn.CrossEntropyLoss(reduction="sum", ignore_index=inner.ignore_index)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        valid = (batch["label"] != self.criterion.ignore_index).sum()
        loss = self.valid(self.net(batch["x"]), batch["label"]) / valid.clamp(min=1)
        self.log("epoch", loss, on_step=False, on_epoch=True, batch_size=int(valid.clamp(min=1)), sync_dist=True)
        return loss


def logs_fit(module: Any, shares: Any) -> dict[str, Any]:
    return hetero_fit(Recipe(module=module, loader=partial(sized, 24), batch_size=2, max_epochs=1), {"shares": shares})


@pytest.mark.parametrize("module", [Logs, Finite])
def test_a_loss_over_nothing_is_left_out(module: Any) -> None:
    """Where all targets of a rank are ignored, its loss is logged by nobody, and the others' are."""
    outs = run_ranks(2, logs_fit, partial(module, ignore_index=1), [3, 1])
    for out in outs:
        assert not any(math.isnan(value) for value in out["metrics"].values()), out["metrics"]
    labels = Numbers(24).label
    assert any(int(labels[i]) == 1 for i in range(3, 24, 4)), "rank 1 has a step in which nothing counts"
    if module is Finite:  # each rank logged with its count: the epoch's value is the mean over all valid targets
        reference = plain_fit(
            Recipe(module=partial(module, ignore_index=1, declares=False), loader=partial(sized, 24), max_epochs=1), 24
        )
        assert reference["metrics"].keys() == outs[0]["metrics"].keys()


class Broken(Classifier):
    """A genuine NaN in batch 1, on every rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * float("nan") if batch_idx == 1 else loss


def test_a_genuine_nan_stays_visible() -> None:
    """A loss that is NaN though it counts is not hidden: it reaches the parameters, as in one process."""
    for out in run_ranks(2, logs_fit, Broken, [3, 1]):
        assert bool(torch.isnan(out["parameters"]).all())


def test_the_users_loss_is_logged_not_the_weighted_one() -> None:
    """With shares 3:1 rank 0's loss is weighted by 1.5; what is logged is the loss that training_step returned."""
    out = run_ranks(2, logs_fit, Logs, [3, 1])[0]
    plain = plain_fit(Recipe(module=Logs, loader=partial(sized, 24), max_epochs=1), 4)
    assert out["metrics"]["epoch"] == pytest.approx(plain["metrics"]["epoch"], rel=1e-6)
    assert out["metrics"]["step"] == pytest.approx(plain["metrics"]["step"], rel=1e-6)


def batch_norm_fit(size: int) -> Any:
    from lightning_hetero import HeteroStrategy

    strategy = HeteroStrategy(shares=[20, 1, 1])
    module = Normalized()
    make_trainer(strategy, 3, max_epochs=1).fit(module, sized(size, 6))
    return strategy.plan.local_batches, [len(s) for s in module.seen]


def test_batch_norm_gets_two_samples_everywhere() -> None:
    """With a live BatchNorm no rank computes fewer than 2, neither by plan, nor in the last batch, nor borrowed."""
    outs = run_ranks(3, batch_norm_fit, 18 + 3)
    assert outs[0][0] == (14, 2, 2)
    assert [sizes[-1] for _, sizes in outs] == [3, 2, 2], "a last batch of 3 goes to one rank; the others borrow 2"
    assert min(size for _, sizes in outs for size in sizes) == 2
