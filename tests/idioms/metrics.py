"""Idioms of torchmetrics: https://lightning.ai/docs/torchmetrics/stable/pages/lightning.html."""

from typing import Any

import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, SumMetric
from torchmetrics.classification import (
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.regression import ExplainedVariance, R2Score, SpearmanCorrCoef
from torchmetrics.retrieval import RetrievalMAP

from tests.idioms.gallery import Run, Topic
from tests.idioms.modules import Classifier, Linear

TOPIC = Topic("Metrics")


def micro(**options: Any) -> MulticlassAccuracy:
    return MulticlassAccuracy(4, average="micro", **options)


class WithAccuracy(Classifier):
    """Has a metric for each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.train_acc, self.val_acc = micro(), micro()


@TOPIC.idiom("a metric object, logged in training and validation", tolerance=1e-6)
def log_the_object(run: Run) -> Any:
    class Module(WithAccuracy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train_acc(self(batch["x"]), batch["label"])
            self.log("train_acc", self.train_acc, on_step=True, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_acc(self(batch["x"]), batch["label"])
            self.log("val_acc", self.val_acc)

    return run.fit(Module(), run.loader(30), run.loader(22))


@TOPIC.idiom("the value that a metric returns for a batch, logged", tolerance=1e-6)
def log_forward(run: Run) -> Any:
    class Module(WithAccuracy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = self.train_acc(self(batch["x"]), batch["label"])
            self.log("train_acc", value, on_step=True, on_epoch=True, sync_dist=True)
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", self.val_acc(self(batch["x"]), batch["label"]), sync_dist=True)

    return run.fit(Module(), run.loader(30), run.loader(22))


@TOPIC.idiom("`update` in steps, `compute`, `log` and `reset` at an epoch's end", tolerance=1e-6)
def by_hand(run: Run) -> Any:
    class Module(WithAccuracy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train_acc.update(self(batch["x"]), batch["label"])
            return self.loss(batch)

        def on_train_epoch_end(self) -> None:
            self.log("train_acc", self.train_acc.compute())
            self.train_acc.reset()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.val_acc.update(self(batch["x"]), batch["label"])

        def on_validation_epoch_end(self) -> None:
            self.log("val_acc", self.val_acc.compute())
            self.val_acc.reset()

    return run.fit(Module(), run.loader(30), run.loader(22))


@TOPIC.idiom(
    "`metric.compute()` logged in `training_step`, the last global batch smaller than the world", tolerance=1e-6
)
def compute_in_step(run: Run) -> Any:
    class Module(WithAccuracy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train_acc.update(self(batch["x"]), batch["label"])
            self.log("train_acc", self.train_acc.compute())
            return self.loss(batch)

    return run.fit(Module(), run.loader(25), max_epochs=1)


@TOPIC.idiom("`ReduceLROnPlateau` on a metric's step value, `log_every_n_steps=1`", tolerance=1e-6)
def plateau_on_metric(run: Run) -> Any:
    class Module(WithAccuracy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train_acc(self(batch["x"]), batch["label"])
            self.log("train_acc", self.train_acc, on_step=True, on_epoch=False)
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0)
            scheduler = {"scheduler": plateau, "monitor": "train_acc", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

        def on_train_end(self) -> None:
            self.lr = self.optimizers().param_groups[0]["lr"]

    module = Module()
    values = run.fit(module, run.loader(40), log_every_n_steps=1)
    return {**values, "lr": module.lr}


class Holder(Linear):
    """Updates one metric in validation; computes it by hand at the end, and never resets it unless it is logged."""

    def __init__(self, metric: Metric, logs: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(5, 4).double()
        self.metric, self.logs, self.values = metric, logs, []

    def forward(self, x: Any) -> Any:
        return self.layer(x)

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        return self(batch["x"]), batch["label"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update(*self.arguments(batch))
        if self.logs:
            self.log("metric", self.metric)

    def on_validation_epoch_end(self) -> None:
        if not self.logs:
            self.values.append(torch.as_tensor(self.metric.compute()).tolist())
            self.metric.reset()


def both_ways(run: Run, make: Any, arguments: Any = None, *, scalar: bool = True, samples: int = 30) -> Any:
    """A metric that is logged as an object, if it is a scalar, and one that is computed by hand."""
    results: dict[str, Any] = {}
    for logs in (True, False) if scalar else (False,):
        module = Holder(make(), logs)
        if arguments is not None:
            module.arguments = lambda batch, module=module: arguments(module, batch)
        found = run.validate(module, run.loader(samples))
        results |= {"logged": found["metric"]} if logs else {"by hand": module.values}
    return results


def regression(module: Any, batch: Any) -> tuple[Any, ...]:
    return module(batch["x"])[:, 0], batch["y"]


def f_score() -> Metric:
    precision, recall = MulticlassPrecision(4, average="micro"), MulticlassRecall(4, average="micro")
    return 2 * precision * recall / (precision + recall)


STATES: dict[str, tuple[Any, ...]] = {
    "`MulticlassAUROC`, lists of predictions": (lambda: MulticlassAUROC(4),),
    "`MulticlassAUROC` with thresholds": (lambda: MulticlassAUROC(4, thresholds=5),),
    "`SpearmanCorrCoef`": (SpearmanCorrCoef, regression),
    "`R2Score`": (R2Score, regression),
    "`ExplainedVariance` of doubles": (ExplainedVariance, lambda m, b: (m(b["x"]), b["x"][:, :4])),
    "`RetrievalMAP`": (
        RetrievalMAP,
        lambda m, b: (m(b["x"])[:, 0], b["label"] > 1, b["index"] % 3),
    ),
    "`MeanMetric` with weights": (MeanMetric, lambda m, b: (b["y"], b["label"] + 1)),
    "`MaxMetric`": (MaxMetric, lambda m, b: (b["y"],)),
    "`BinaryCalibrationError`": (
        BinaryCalibrationError,
        lambda m, b: (m(b["x"])[:, 0].sigmoid(), b["label"] % 2),
    ),
    "`MulticlassAccuracy(dist_sync_on_step=True)`": (lambda: micro(dist_sync_on_step=True),),
    "a compositional metric, `2 * p * r / (p + r)`": (f_score,),
}


def _states(*options: Any) -> Any:
    return lambda run: both_ways(run, *options)


for name, states in STATES.items():
    TOPIC.idiom(f"{name}: logged, and computed by hand", tolerance=1e-6)(_states(*states))


@TOPIC.idiom("`R2Score` of several outputs, computed by hand", tolerance=1e-6)
def outputs(run: Run) -> Any:
    def make() -> Metric:
        return R2Score(multioutput="raw_values")

    return both_ways(run, make, lambda m, b: (m(b["x"]), b["x"][:, :4]), scalar=False)


@TOPIC.idiom("`R2Score` of two samples, shares so uneven that a rank has only one", tolerance=1e-6)
def two_samples(run: Run) -> Any:
    return both_ways(run, R2Score, regression, samples=2)


@TOPIC.idiom("`MulticlassConfusionMatrix`, computed by hand")
def confusion(run: Run) -> Any:
    return both_ways(run, lambda: MulticlassConfusionMatrix(4), scalar=False)


@TOPIC.idiom("`CatMetric`: every value", tolerance=1e-6)
def values_of_all(run: Run) -> Any:
    module = Holder(CatMetric(), logs=False)
    module.arguments = lambda batch: (batch["y"],)
    run.validate(module, run.loader(30))
    return {"values": [sorted(values) for values in module.values]}


class Lengths(Metric):
    """One's own, with a list of tensors of different lengths that is not concatenated, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("items", [], dist_reduce_fx=None)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, y: torch.Tensor, lengths: torch.Tensor) -> None:
        self.items += [torch.arange(int(n)) for n in lengths]
        self.total += y.sum()

    def compute(self) -> torch.Tensor:
        return self.total + sum(len(item) ** 2 for item in self.items)


@TOPIC.idiom("a metric of one's own, with a list of a tensor for each sample, as detection has: logged, and by hand")
def own_metric(run: Run) -> Any:
    return both_ways(run, Lengths, lambda m, b: (b["y"], b["label"]))


@TOPIC.idiom("a metric with `sync_on_compute=False`, its value logged at the end", tolerance=1e-6)
def unsynced(run: Run) -> Any:
    class Module(Holder):
        def on_validation_epoch_end(self) -> None:
            self.log("accuracy", self.metric.compute().double(), sync_dist=True)

    return run.validate(Module(micro(sync_on_compute=False), logs=False), run.loader(30))


@TOPIC.idiom("`SumMetric` in training, as an object with step and epoch values", tolerance=1e-6)
def sums(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.samples = SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.samples(len(batch["x"]))
            self.log("samples", self.samples, on_step=True, on_epoch=True)
            return self.loss(batch)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("a metric of `torchmetrics.functional`, logged", tolerance=1e-6)
def functional(run: Run) -> Any:
    class Module(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch["x"])
            value = torchmetrics.functional.accuracy(
                logits, batch["label"], "multiclass", num_classes=4, average="micro"
            )
            self.log("accuracy", value, sync_dist=True)

    return run.validate(Module(), run.loader(30))


@TOPIC.idiom("a metric that starts to be updated in one epoch and is read in the next", tolerance=1e-6)
def over_epochs(run: Run) -> Any:
    class Module(WithAccuracy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.train_acc.update(self(batch["x"]), batch["label"])
            return self.loss(batch)

        def on_train_epoch_end(self) -> None:
            if self.current_epoch % 2:
                self.log("two_epochs", self.train_acc.compute())
                self.train_acc.reset()

    return run.fit(Module(), run.loader(30), max_epochs=4)


class InCallback(Callback):
    """Holds metrics of its own, which the module does not know."""

    def __init__(self, make: Any, arguments: Any) -> None:
        self.metric, self.arguments, self.values = make(), arguments, []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.metric.update(*self.arguments(pl_module, batch))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(float(self.metric.compute()))
        self.metric.reset()


IN_CALLBACKS: dict[str, tuple[Any, Any, int]] = {
    "`MulticlassAccuracy`": (micro, lambda m, b: (m(b["x"]), b["label"]), 30),
    "`MulticlassAUROC`, few samples": (lambda: MulticlassAUROC(4), lambda m, b: (m(b["x"]), b["label"]), 9),
    "`SpearmanCorrCoef`, few samples": (SpearmanCorrCoef, regression, 5),
    "`RetrievalMAP`, few samples": (RetrievalMAP, STATES["`RetrievalMAP`"][1], 7),
}


def _in_callback(make: Any, arguments: Any, samples: int) -> Any:
    def function(run: Run) -> Any:
        callback = InCallback(make, arguments)
        module = Classifier()
        module.validation_step = lambda batch, batch_idx: None
        run.validate(module, run.loader(samples), callbacks=[callback])
        return {"values": callback.values}

    return function


for name, options in IN_CALLBACKS.items():
    TOPIC.idiom(f"{name} in a callback, computed in `on_validation_epoch_end`", tolerance=1e-6)(_in_callback(*options))


@TOPIC.idiom(
    "`metric.compute()` under `if trainer.is_global_zero`",
    sentence=r"rank 0 .*alone in",
    reason="a sentence: computing gathers the states of all ranks, so all of them have to call it",
)
def on_one_rank(run: Run) -> Any:
    class Module(Holder):
        def on_validation_epoch_end(self) -> None:
            if self.trainer.is_global_zero:
                self.values.append(float(self.metric.compute()))

    module = Module(micro(), logs=False)
    run.validate(module, run.loader(30))
    return {"values": module.values}
