"""Idioms of callbacks: Lightning's own, and what people write; https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html."""

from typing import Any

import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch.optim.swa_utils import get_ema_avg_fn

from tests.idioms.gallery import Alike, Run, Topic
from tests.idioms.logged_values import csv_logger, numbers
from tests.idioms.modules import Linear
from tests.trainer.fits import parameters_of

TOPIC = Topic("Callbacks and stopping")


class Logging(Linear):
    """Logs its loss in training too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


def fit(run: Run, callback: Any, **options: Any) -> Any:
    return run.fit(Logging(), run.loader(30), run.loader(22), callbacks=[callback], **options)


@TOPIC.idiom("`EarlyStopping` on the validation loss")
def early_stopping(run: Run) -> Any:
    return fit(run, EarlyStopping("val_loss", min_delta=0.05, patience=0), max_epochs=20)


@TOPIC.idiom("`EarlyStopping` on the training loss, `check_on_train_epoch_end=True`")
def early_stopping_on_training(run: Run) -> Any:
    stopping = EarlyStopping("loss_epoch", min_delta=0.05, patience=0, check_on_train_epoch_end=True)
    return fit(run, stopping, max_epochs=20)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "`monitor`, `save_top_k=2`": {"monitor": "val_loss", "save_top_k": 2},
    "`every_n_train_steps=3`, all kept": {"every_n_train_steps": 3, "save_top_k": -1},
    "a monitored step value, `every_n_train_steps=1`": {"monitor": "loss_step", "every_n_train_steps": 1},
    "`save_last=True`, a value in the file's name": {
        "save_last": True,
        "filename": "{epoch}-{val_loss:.3f}",
        "monitor": "val_loss",
    },
    "`save_on_train_epoch_end=True` on the training loss": {"monitor": "loss_epoch", "save_on_train_epoch_end": True},
}


def _checkpoints(options: dict[str, Any]) -> Any:
    def function(run: Run) -> Any:
        checkpoint = ModelCheckpoint(run.folder / "saved", **options)
        values = fit(run, checkpoint, max_epochs=4, enable_checkpointing=True)
        files = sorted(path.name for path in (run.folder / "saved").iterdir())
        best = [float(value) for value in checkpoint.best_k_models.values()]
        state = torch.load(checkpoint.best_model_path, weights_only=False)["state_dict"]
        return {**values, "files": files, "best": best, "weights": torch.cat([v.flatten() for v in state.values()])}

    return function


for name, options in CHECKPOINTS.items():
    TOPIC.idiom(f"`ModelCheckpoint`: {name}")(_checkpoints(options))


@TOPIC.idiom("`LearningRateMonitor`: rows of a CSVLogger")
def learning_rates(run: Run) -> Any:
    class Module(Linear):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    monitor = LearningRateMonitor("step")
    values = run.fit(Module(), callbacks=[monitor], logger=csv_logger(run), log_every_n_steps=1)
    return {**values, **{f"rows of {key}": row for key, row in numbers(run).items()}}


AVERAGING: dict[str, Any] = {
    "`StochasticWeightAveraging`": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
    "`WeightAveraging` as an exponential moving average": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.8)),
    "`GradientAccumulationScheduler`": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
    "`Timer`": lambda: Timer({"hours": 1}),
    "`ModelSummary`": ModelSummary,
    "`OnExceptionCheckpoint`": lambda: OnExceptionCheckpoint("/nowhere"),
    "`ModelPruning`, a third of the weights": lambda: ModelPruning("l1_unstructured", amount=0.34),
}


def _averaging(make: Any) -> Any:
    return lambda run: fit(run, make(), max_epochs=3, enable_checkpointing=True)


for name, make in AVERAGING.items():
    TOPIC.idiom(name)(_averaging(make))


@TOPIC.idiom("`LearningRateFinder` without early stopping")
def learning_rate_finder(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Module()
    # It goes by rank 0's own loss, and not by that of the global batch.
    finder = LearningRateFinder(num_training_steps=24, early_stop_threshold=None)
    values = run.fit(module, run.loader(96), callbacks=[finder])
    return {name: Alike(value) for name, value in {**values, "lr": module.lr}.items()}


@TOPIC.idiom(
    "`BatchSizeFinder`",
    sentence="not supported with distributed strategies",
    reason="Lightning refuses it; `memory_limit` bounds each rank's share",
)
def batch_size_finder(run: Run) -> Any:
    class Module(Linear):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return run.loader(30, self.batch_size)

        val_dataloader = train_dataloader

    trainer = run.trainer(callbacks=[BatchSizeFinder("power", steps_per_trial=1, max_trials=1)])
    trainer.fit(Module())
    return {}


@TOPIC.idiom("`LambdaCallback`")
def lambda_callback(run: Run) -> Any:
    events: list[Any] = []
    callback = LambdaCallback(
        on_train_start=lambda trainer, module: events.append("start"),
        on_train_batch_end=lambda trainer, *_: events.append(trainer.global_step),
        on_validation_epoch_end=lambda trainer, module: events.append("validated"),
        on_fit_end=lambda trainer, module: events.append("end"),
    )
    values = run.fit(Linear(), run.loader(), run.loader(), callbacks=[callback])
    return {**values, "events": events}


@TOPIC.idiom("a callback with `state_dict` and `load_state_dict`, over a resumed run")
def callback_state(run: Run) -> Any:
    class Counter(Callback):
        batches = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.batches += 1

        def state_dict(self) -> dict[str, Any]:
            return {"batches": self.batches}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.batches = state_dict["batches"]

    trainer = run.trainer(callbacks=[Counter()])
    trainer.fit(Linear(), run.loader())
    trainer.save_checkpoint(run.folder / "saved.ckpt")
    counter = Counter()
    values = run.fit(Linear(), ckpt_path=run.folder / "saved.ckpt", callbacks=[counter], max_epochs=3)
    return {**values, "batches": counter.batches}


@TOPIC.idiom("norms of gradients, in `on_after_backward` and `on_before_optimizer_step` of a callback")
def norms(run: Run) -> Any:
    class Norms(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            self.values.append(float(pl_module.layer.weight.grad.norm()))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            total = sum(p.grad.square().sum() for group in optimizer.param_groups for p in group["params"])
            self.values.append(float(total.sqrt()))

    norms = Norms()
    run.fit(Linear(), run.loader(30), callbacks=[norms])
    return {"norms": norms.values}


@TOPIC.idiom("an exponential moving average by hand, in `on_train_batch_end`")
def moving_average(run: Run) -> Any:
    class Average(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.average = parameters_of(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.average = 0.9 * self.average + 0.1 * parameters_of(pl_module)

    callback = Average()
    run.fit(Linear(), run.loader(30), callbacks=[callback])
    return {"average": callback.average}


@TOPIC.idiom("`on_train_batch_start` returns -1 to leave the epoch, on all ranks")
def leaving(run: Run) -> Any:
    class Module(Linear):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 2 else None

    return run.fit(Module())


@TOPIC.idiom("`trainer.should_stop = True` on all ranks, by a value of `callback_metrics`")
def stop_by_value(run: Run) -> Any:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop |= float(trainer.callback_metrics["loss_epoch"]) < 1.0

    return run.fit(Logging(), callbacks=[Stop()], max_epochs=20)


def _stopping(hook: str) -> Any:
    def stop(self: Callback, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1 and trainer.current_epoch == 1:
            trainer.should_stop = True

    def function(run: Run) -> Any:
        callback = type("Stop", (Callback,), {hook: stop})()
        return run.fit(Linear(), run.loader(), run.loader(), callbacks=[callback], max_epochs=5)

    return function


for hook in ("on_train_epoch_start", "on_train_epoch_end", "on_validation_end", "on_validation_epoch_end"):
    TOPIC.idiom(f"`trainer.should_stop = True` on one rank, in `{hook}`")(_stopping(hook))


@TOPIC.idiom("`trainer.should_stop = True` on one rank, in the `on_train_batch_end` of the last batch of an epoch")
def stop_in_batch(run: Run) -> Any:
    # In the middle of an epoch the messages of the next step tell the other ranks: that may be a step later.
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_rank == trainer.world_size - 1 and trainer.is_last_batch:
                trainer.should_stop = True

    return run.fit(Linear(), callbacks=[Stop()], max_epochs=5)


@TOPIC.idiom("`max_steps` and `max_time`, `min_epochs`")
def limits(run: Run) -> Any:
    return run.fit(Linear(), max_steps=7, max_epochs=-1, max_time={"hours": 1}, min_epochs=1)
