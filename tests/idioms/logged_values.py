"""Idioms of logging: https://lightning.ai/docs/pytorch/stable/extensions/logging.html."""

import csv
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from tests.idioms.gallery import Alike, Run, Topic, logged
from tests.idioms.modules import Classifier, Linear

TOPIC = Topic("Logging")


def rows(run: Run) -> list[dict[str, str]]:
    """What the CSVLogger has written, without what the strategy logs of itself; the last row may lack the end."""
    with (run.folder / "log" / "metrics.csv").open() as file:
        table = [{k: v for k, v in row.items() if not k.startswith("hetero/")} for row in csv.DictReader(file)]
    return [row for row in table if any(value for key, value in row.items() if key not in {"step", "epoch"})]


def numbers(run: Run) -> dict[str, list[float]]:
    return {key: [float(row[key]) for row in rows(run) if row[key]] for key in rows(run)[0]} if run.rank == 0 else {}


def csv_logger(run: Run) -> CSVLogger:
    return CSVLogger(run.folder, name="log", version="")


COMBINATIONS: dict[str, dict[str, Any]] = {
    "`on_step=True`": {"on_step": True, "on_epoch": False},
    "`on_epoch=True`": {"on_step": False, "on_epoch": True},
    "both": {"on_step": True, "on_epoch": True},
    "both, `sync_dist=True`": {"on_step": True, "on_epoch": True, "sync_dist": True},
    "both, `prog_bar=True`, `batch_size` passed": {"on_step": True, "on_epoch": True, "prog_bar": True, "own": True},
}


def _combination(options: dict[str, Any]) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            chosen = {**options}
            if chosen.pop("own", False):
                chosen["batch_size"] = len(batch["x"])
            self.log("train_loss", loss, **chosen)
            self.log("target", batch["y"].mean(), **chosen)
            return loss

    def function(run: Run) -> Any:
        values = run.fit(Module(), run.loader(30), logger=csv_logger(run), log_every_n_steps=1)
        return {**values, **{f"rows of {key}": row for key, row in numbers(run).items()}}

    return function


for name, options in COMBINATIONS.items():
    TOPIC.idiom(f"a loss and a mean logged in `training_step`, {name}: all rows of a CSVLogger", tolerance=1e-6)(
        _combination(options)
    )


@TOPIC.idiom("`reduce_fx` sum, max and min")
def reductions(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            y = batch["y"]
            self.log("sum", y.sum(), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
            self.log("max", y.max(), on_step=False, on_epoch=True, reduce_fx=torch.max, sync_dist=True)
            self.log("min", y.min(), on_step=False, on_epoch=True, reduce_fx="min", sync_dist=True)
            return self.loss(batch)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("`log_dict` in training and validation")
def log_dict(run: Run) -> Any:
    class Module(Classifier):
        def shared(self, batch: Any, stage: str) -> Any:
            loss = self.loss(batch)
            accuracy = (self(batch["x"]).argmax(1) == batch["label"]).double().mean()
            values = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
            self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.shared(batch, "train")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.shared(batch, "val")

    return run.fit(Module(), run.loader(30), run.loader(22))


HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
)


def _hook(name: str, who: str) -> Any:
    def hook(self: Any, *args: Any) -> None:
        module = self if isinstance(self, pl.LightningModule) else args[1]
        module.log(f"{who}/{name}", float(module.global_step), sync_dist=True)

    return hook


@TOPIC.idiom("`self.log` in every hook that allows it, of the module and of a callback")
def every_hook(run: Run) -> Any:
    module = type("Module", (Linear,), {hook: _hook(hook, "module") for hook in HOOKS})
    callback = type("Logging", (Callback,), {hook: _hook(hook, "callback") for hook in HOOKS})
    return run.fit(module(), run.loader(), run.loader(), callbacks=[callback()])


@TOPIC.idiom("numbers, tensors and a metric as values", tolerance=1e-6)
def types_of_values(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.mean.update(batch["y"])
            options = {"on_step": False, "on_epoch": True}
            self.log("float", batch["y"].mean().item(), **options)
            self.log("int", batch_idx, **options)
            self.log("tensor", batch["y"].mean()[None], **options)
            self.log("metric", self.mean, **options)
            self.log("bool", (batch["y"] > 0).any(), reduce_fx="max", **options)
            return self.loss(batch)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("a loss logged as `loss.item()` in double precision", tolerance=1e-6)
def item(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss.item(), on_step=True, on_epoch=True)
            return loss

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("values of a callback, in training and validation batches and at epochs' ends")
def callback_logs(run: Run) -> Any:
    class Logging(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.outs: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            self.log("train", batch["y"].mean(), on_step=False, on_epoch=True, sync_dist=True)
            self.outs.append(batch["y"].mean())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log("train_end", torch.stack(self.outs).mean(), sync_dist=True)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            pl_module.log("val", batch["y"].mean(), sync_dist=True)

    return run.fit(Linear(), run.loader(), run.loader(30), callbacks=[Logging()])


@TOPIC.idiom("`rank_zero_only=True` under `if trainer.is_global_zero`")
def rank_zero_only(run: Run) -> Any:
    class Module(Linear):
        def on_train_epoch_end(self) -> None:
            if self.trainer.is_global_zero:
                self.log("epoch", float(self.current_epoch), rank_zero_only=True)

    return run.fit(Module())


@TOPIC.idiom("a list of losses, stacked in `on_train_epoch_end`")
def losses_of_an_epoch(run: Run) -> Any:
    class Module(Linear):
        def on_train_epoch_start(self) -> None:
            self.losses: list[torch.Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.losses.append(loss.detach())
            return loss

        def on_train_epoch_end(self) -> None:
            self.log("mean_loss", torch.stack(self.losses).mean())

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("`trainer.callback_metrics['loss']` read in `on_train_batch_end` in each step, no logger")
def read_each_step(run: Run) -> Any:
    # May be a step late: the last step's value is read in the end.
    class Reader(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.values.append(float(trainer.callback_metrics["loss"]))

    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

    reader = Reader()
    values = run.fit(Module(), callbacks=[reader])
    return {**values, "reads": len(reader.values), "values": Alike(reader.values)}


@TOPIC.idiom("`trainer.logged_metrics` and `trainer.callback_metrics` after each epoch", tolerance=1e-6)
def logged_metrics(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, logger=True, on_epoch=True)
            self.log("hidden", loss, logger=False)
            return loss

    class Reader(Callback):
        def __init__(self) -> None:
            self.values: list[dict[str, float]] = []

        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.values.append({key: float(value) for key, value in sorted(trainer.logged_metrics.items())})
            self.values.append(logged(trainer))

    reader = Reader()
    run.fit(Module(), logger=csv_logger(run), log_every_n_steps=1, callbacks=[reader])
    ours = [{k: v for k, v in found.items() if not k.startswith("hetero/")} for found in reader.values]
    return {
        "names": [sorted(found) for found in ours],
        "values": [v for found in ours for _, v in sorted(found.items())],
    }


@TOPIC.idiom("the gradient's norm, logged in `on_before_optimizer_step`")
def gradient_norm(run: Run) -> Any:
    class Module(Linear):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(pl.utilities.grad_norm(self.layer, norm_type=2))

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("a learning rate logged with `self.log`")
def learning_rate(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=True)
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    return run.fit(Module())


@TOPIC.idiom("a value logged in every second batch only")
def now_and_then(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx % 2:
                self.log("now_and_then", batch["y"].mean(), on_step=False, on_epoch=True, sync_dist=True)
            return self.loss(batch)

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("`self.logger.log_metrics` and `log_hyperparams` under `is_global_zero`", tolerance=1e-6)
def logger_by_hand(run: Run) -> Any:
    class Module(Linear):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()

        def on_train_epoch_end(self) -> None:
            if self.trainer.is_global_zero:
                self.logger.log_metrics({"by_hand": float(self.current_epoch)}, step=self.global_step)

    values = run.fit(Module(width=5), logger=csv_logger(run))
    return (
        {**values, "rows": [row.get("by_hand", "") for row in rows(run)] if run.rank == 0 else []}
        if (run.rank == 0)
        else values
    )


@TOPIC.idiom("values of training with `accumulate_grad_batches=2`", tolerance=1e-6)
def accumulated(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
            return loss

    options = {"accumulate_grad_batches": 2, "logger": csv_logger(run), "log_every_n_steps": 1}
    values = run.fit(Module(), run.loader(30), **options)
    return {**values, **{f"rows of {key}": row for key, row in numbers(run).items()}}


@TOPIC.idiom("`on_step=True` values of the last step, smaller than the others")
def last_step(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("target", batch["y"].mean(), sync_dist=True)
            self.log("most", batch["y"].max(), reduce_fx="max", sync_dist=True)
            return self.loss(batch)

    return run.fit(Module(), run.loader(25))


@TOPIC.idiom("single precision", tolerance=1e-5)
def single(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.float()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = torch.nn.functional.mse_loss(self(batch["x"].float()), batch["y"].float())
            self.log("loss", loss, on_epoch=True, prog_bar=True)
            return loss

    return run.fit(Module(), run.loader(30))
