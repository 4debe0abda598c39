"""Idioms of torchmetrics: where metrics are kept, collections and wrappers."""

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from torchmetrics.regression import MeanSquaredError, R2Score
from torchmetrics.wrappers import (
    BootStrapper,
    ClasswiseWrapper,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
    MultitaskWrapper,
    Running,
)

from tests.idioms.gallery import Alike, Run, Topic
from tests.idioms.modules import Classifier, Linear

TOPIC = Topic("Collections and wrappers of metrics")


def collection(**options: Any) -> MetricCollection:
    return MetricCollection([MulticlassPrecision(4), MulticlassRecall(4), MulticlassF1Score(4)], **options)


class Collected(Classifier):
    """A collection for each stage."""

    def __init__(self, metrics: MetricCollection) -> None:
        super().__init__()
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict(self.train_metrics(self(batch["x"]), batch["label"]), on_step=False, on_epoch=True)
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_metrics.update(self(batch["x"]), batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.test_metrics.update(self(batch["x"]), batch["label"])
        self.log_dict(self.test_metrics, on_step=False, on_epoch=True)


@TOPIC.idiom("`MetricCollection` cloned with a prefix for training, validation and test", tolerance=1e-6)
def prefixes(run: Run) -> Any:
    # What training logs are values of batches, which are no means over samples: they are left out.
    module = Collected(collection())
    values = run.fit(module, run.loader(30), run.loader(22))
    values = {key: value for key, value in values.items() if not key.startswith("train_")}
    return {**values, **run.test(module, run.loader(26))}


@TOPIC.idiom("`MetricCollection(compute_groups=False)`", tolerance=1e-6)
def without_groups(run: Run) -> Any:
    return run.test(Collected(collection(compute_groups=False)), run.loader(26))


@TOPIC.idiom("`MetricCollection` with compute groups, updated in a callback and computed at the end", tolerance=1e-6)
def groups_in_callback(run: Run) -> Any:
    class Metrics(Callback):
        def __init__(self) -> None:
            self.metrics = collection(prefix="callback_")

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            self.metrics.update(pl_module(batch["x"]), batch["label"])

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log_dict(self.metrics.compute())
            self.metrics.reset()

    return run.validate(Classifier(), run.loader(30), callbacks=[Metrics()])


def micro() -> MulticlassAccuracy:
    return MulticlassAccuracy(4, average="micro")


PLACES: dict[str, Any] = {
    "a `ModuleList`": lambda: nn.ModuleList([micro(), MulticlassF1Score(4)]),
    "a `ModuleDict`": lambda: nn.ModuleDict({"first": micro(), "second": MulticlassF1Score(4)}),
    "a plain list": lambda: [micro(), MulticlassF1Score(4)],
    "a plain dict": lambda: {"first": micro(), "second": MulticlassF1Score(4)},
}


def _place(make: Any) -> Any:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        @property
        def each(self) -> list[Any]:
            return list(self.held.values() if hasattr(self.held, "values") else self.held)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            for metric in self.each:
                metric.update(self(batch["x"]), batch["label"])

        def on_validation_epoch_end(self) -> None:
            for i, metric in enumerate(self.each):
                self.log(f"metric_{i}", metric.compute())
                metric.reset()

    return lambda run: run.validate(Module(), run.loader(30))


for name, make in PLACES.items():
    TOPIC.idiom(f"metrics in {name}, computed at the end", tolerance=1e-6)(_place(make))


@TOPIC.idiom("a `ModuleList` with a metric for each validation loader, logged as objects", tolerance=1e-6)
def metric_of_loader(run: Run) -> Any:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.accuracies = nn.ModuleList([micro(), micro()])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            metric = self.accuracies[dataloader_idx]
            metric(self(batch["x"]), batch["label"])
            self.log("accuracy", metric)

    return run.validate(Module(), [run.loader(22), run.loader(9)])


@TOPIC.idiom("`MetricTracker` over epochs, its best value", tolerance=1e-6)
def tracker(run: Run) -> Any:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.tracker = MetricTracker(micro(), maximize=True)

        def on_validation_epoch_start(self) -> None:
            self.tracker.increment()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.tracker.update(self(batch["x"]), batch["label"])

        def on_validation_epoch_end(self) -> None:
            self.log("accuracy", self.tracker.compute())

    module = Module()
    values = run.fit(module, run.loader(), run.loader(30), max_epochs=3)
    best, epoch = module.tracker.best_metric(return_step=True)
    return {**values, "best": best, "epoch": epoch}


class Wrapped(Linear):
    """One wrapper, updated in validation, computed by hand at the end."""

    def __init__(self, metric: Any, arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(5, 4).double()
        self.metric, self.arguments, self.values = metric, arguments, []

    def forward(self, x: Any) -> Any:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch["x"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.update(*self.arguments(self(batch["x"]), batch))

    def on_validation_epoch_end(self) -> None:
        self.values.append(flattened(self.metric.compute()))
        self.metric.reset()


def flattened(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [v for key in sorted(value) for v in flattened(value[key])]
    if isinstance(value, list | tuple):
        return [v for item in value for v in flattened(item)]
    return torch.as_tensor(value).flatten().tolist()


def classes(logits: Any, batch: Any) -> tuple[Any, ...]:
    return logits, batch["label"]


WRAPPERS: dict[str, tuple[Any, Any]] = {
    "`ClasswiseWrapper`": (lambda: ClasswiseWrapper(MulticlassAccuracy(4, average=None)), classes),
    "`MinMaxMetric`": (lambda: MinMaxMetric(micro()), classes),
    "`MultioutputWrapper`": (
        lambda: MultioutputWrapper(R2Score(), 4),
        lambda logits, batch: (logits, batch["x"][:, :4]),
    ),
    "`MultitaskWrapper`": (
        lambda: MultitaskWrapper({"label": micro(), "target": MeanSquaredError()}),
        lambda logits, batch: (
            {"label": logits, "target": logits[:, 0]},
            {"label": batch["label"], "target": batch["y"]},
        ),
    ),
}


def _wrapped(make: Any, arguments: Any) -> Any:
    def function(run: Run) -> Any:
        module = Wrapped(make(), arguments)
        run.fit(module, run.loader(), run.loader(30))
        return {"values": module.values}

    return function


for name, wrapper in WRAPPERS.items():
    TOPIC.idiom(f"{name}, computed at the end of each validation", tolerance=1e-6)(_wrapped(*wrapper))


@TOPIC.idiom("`ClasswiseWrapper` in a `MetricCollection`, `log_dict` at the end", tolerance=1e-6)
def classwise_collection(run: Run) -> Any:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            each = ClasswiseWrapper(MulticlassAccuracy(4, average=None), labels=["a", "b", "c", "d"])
            self.metrics = MetricCollection({"accuracy": micro(), "each": each}, prefix="val_")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.metrics.update(self(batch["x"]), batch["label"])

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.metrics.compute(), sync_dist=True)
            self.metrics.reset()

    return run.validate(Module(), run.loader(30))


@TOPIC.idiom("`BootStrapper`: the same on all ranks; its draws are random")
def bootstrapped(run: Run) -> Any:
    module = Wrapped(BootStrapper(micro(), num_bootstraps=4), classes)
    run.fit(module, run.loader(), run.loader(30))
    return {"number": len(module.values), "values": Alike(module.values)}


@TOPIC.idiom("`Running(MeanSquaredError)` over the last three batches, logged in training", tolerance=1e-6)
def running(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.running = Running(MeanSquaredError(), window=3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.running.update(self(batch["x"]), batch["y"])
            return self.loss(batch)

        def on_train_epoch_end(self) -> None:
            self.log("running", self.running.compute())

    return run.fit(Module(), run.loader(40))


@TOPIC.idiom("`MeanMetric` of the loss in a callback, with the number of samples as weight", tolerance=1e-6)
def mean_of_losses(run: Run) -> Any:
    class Mean(Callback):
        def __init__(self) -> None:
            self.mean, self.means = MeanMetric(), []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            self.mean.update(outputs["loss"], len(batch["x"]))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.means.append(float(self.mean.compute()))
            self.mean.reset()

    callback = Mean()
    run.fit(Linear(), run.loader(30), callbacks=[callback])
    return {"means": callback.means}


@TOPIC.idiom("a metric that is made in `on_validation_epoch_start`", tolerance=1e-6)
def made_in_a_hook(run: Run) -> Any:
    class Module(Classifier):
        def on_validation_epoch_start(self) -> None:
            self.metrics = collection()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.metrics.update(self(batch["x"]), batch["label"])

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.metrics.compute())

    return run.validate(Module(), run.loader(30))
