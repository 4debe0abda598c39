"""torchmetrics are those of one process wherever they are held, and however they are synchronized."""

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torchmetrics import (
    BootStrapper,
    CatMetric,
    ClasswiseWrapper,
    ExplainedVariance,
    MeanMetric,
    Metric,
    MetricCollection,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
    R2Score,
    SpearmanCorrCoef,
    SumMetric,
)
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
)
from torchmetrics.retrieval import RetrievalMAP

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer
from tests.trainer.loading import once

Found = dict[str, float]


def held() -> dict[str, tuple[Callable[[], Any], Callable[[Any, Any], None]]]:
    """By a name: what makes a metric, and what it is updated with."""

    def classes(metric: Any, batch: Any) -> None:
        metric.update(batch["x"][:, :4].softmax(-1), batch["label"])

    def targets(metric: Any, batch: Any) -> None:
        metric.update(batch["x"][:, 0], batch["y"])

    def columns(metric: Any, batch: Any) -> None:
        metric.update(batch["x"][:, :4], batch["x"][:, 1:])

    def queries(metric: Any, batch: Any) -> None:
        metric.update(batch["x"][:, 0].sigmoid(), batch["label"] % 2, indexes=batch["index"] // 9)

    def tracked(metric: Any, batch: Any) -> None:
        if not metric._increment_called:
            metric.increment()
        classes(metric, batch)

    return {
        "counts": (lambda: MulticlassConfusionMatrix(4), classes),
        "lists": (lambda: MulticlassAUROC(4), classes),
        "lists of two shapes": (SpearmanCorrCoef, targets),
        "queries": (RetrievalMAP, queries),
        "moments": (R2Score, targets),
        "several outputs": (lambda: R2Score(multioutput="raw_values"), columns),
        "double": (lambda: ExplainedVariance(multioutput="raw_values").set_dtype(torch.float64), columns),
        "largest and smallest": (lambda: MinMaxMetric(MulticlassAccuracy(4, average="micro")), classes),
        "classes": (lambda: ClasswiseWrapper(MulticlassAccuracy(4, average=None)), classes),
        "outputs": (lambda: MultioutputWrapper(R2Score(), 4), columns),
        "tracker": (lambda: MetricTracker(MulticlassAccuracy(4)), tracked),
        "collection": (
            lambda: MetricCollection([MulticlassAccuracy(4), MulticlassPrecision(4), MulticlassConfusionMatrix(4)]),
            classes,
        ),
        "on each step": (lambda: SumMetric(dist_sync_on_step=True), lambda metric, batch: metric(batch["y"])),
        "all values": (CatMetric, lambda metric, batch: metric.update(batch["y"])),
        "weighted": (MeanMetric, lambda metric, batch: metric.update(batch["y"], weight=batch["index"] + 1.0)),
    }


class Holding(Callback):
    """Holds all kinds of metrics, which the strategy never sees, and computes them where they are complete."""

    def __init__(self) -> None:
        self.metrics = {name: make() for name, (make, _) in held().items()}
        self.found: list[dict[str, Any]] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        for name, (_, update) in held().items():
            update(self.metrics[name], batch)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        values = {name: metric.compute() for name, metric in self.metrics.items()}
        values["all values"] = values["all values"].reshape(-1).sort().values
        self.found.append(values)  # and they are never reset


class Module(Regression):
    """Holds some in a ModuleList, and logs what does not synchronize by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ModuleList([MulticlassConfusionMatrix(4), MulticlassAccuracy(4, average="micro")])
        self.own = MeanMetric(sync_on_compute=False)
        self.bootstrapped = BootStrapper(MulticlassAccuracy(4, average="micro"), num_bootstraps=3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for metric in self.several:
            metric.update(batch["x"][:, :4], batch["label"])
        self.log("accuracy", self.several[1])
        self.own.update(batch["y"])
        self.log("own", self.own)
        self.bootstrapped.update(batch["x"][:, :4], batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.log("total", self.several[0].compute().sum().double())
        self.log("bootstrapped", self.bootstrapped.compute()["mean"])


def metrics_of(shares: list[int] | None, sizes: list[int]) -> list[Any]:
    warnings.filterwarnings("ignore", message="Metric `.*` will save all targets")
    warnings.filterwarnings("ignore", message="The ``compute`` method of metric MulticlassAccuracy")  # of a bootstrap
    warnings.filterwarnings("ignore", message="a step of the val loader has fewer samples")
    warnings.filterwarnings("ignore", message="(No positive|No negative|Not enough|Average precision score)")
    warnings.filterwarnings("ignore", message="You are trying to use a metric in deterministic mode")
    found = []
    for size in sizes:
        torch.manual_seed(1)
        holding, module = Holding(), Module()
        strategy = HeteroStrategy(shares=shares) if shares else "auto"
        trainer = make_trainer(strategy, len(shares or [0]), callbacks=[holding], max_epochs=1)
        data = DataLoader(Numbers(size), batch_size=4)
        trainer.validate(module, data, verbose=False)
        trainer.validate(module, data, verbose=False)
        found.append((holding.found, {name: float(value) for name, value in trainer.callback_metrics.items()}))
    assert Metric.sync.__module__ == "torchmetrics.metric"
    return found


SIZES = [31, 12, 8]


@once
def computed() -> tuple[list[Any], Any]:
    return run_ranks(3, metrics_of, [5, 3, 1], SIZES), run_ranks(1, metrics_of, None, SIZES)[0]


@pytest.mark.parametrize("name", held())
def test_a_metric_in_a_callback_is_that_of_one_process(name: str) -> None:
    """Never reset, so it counts both evaluations; and computed on all ranks."""
    ranks, one = computed()
    for rank in ranks:
        for (found, _), (expected, _) in zip(rank, one, strict=True):
            for of_rank, of_one in zip(found, expected, strict=True):
                torch.testing.assert_close(of_rank[name], of_one[name], rtol=1e-5, atol=1e-6)


def test_logged_metrics_are_the_same_everywhere() -> None:
    """Also one that the user keeps from synchronizing, and one that draws at random on each rank."""
    ranks, one = computed()
    for number, size in enumerate(SIZES):
        found = [rank[number][1] for rank in ranks]
        assert found[0] == found[1] == found[2]
        expected: Found = one[number][1]
        for name in ("accuracy", "total", "own"):
            assert found[0][name] == pytest.approx(expected[name], rel=1e-6), (name, size)
        assert 0 <= found[0]["bootstrapped"] <= 1


class Plain(pl.LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", mse_loss(batch["x"][:, 0], batch["y"]))


def on_one_rank() -> str:
    make_trainer(HeteroStrategy(), 1).validate(Plain(), DataLoader(Numbers(8)), verbose=False)
    return Metric.sync.__module__


def test_torchmetrics_are_left_as_they_were_in_one_process() -> None:
    assert run_ranks(1, on_one_rank) == ["torchmetrics.metric"]
