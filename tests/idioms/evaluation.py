"""Idioms of validation and test: https://lightning.ai/docs/pytorch/stable/common/evaluation.html."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader

from tests.idioms.gallery import PerSample, Run, Topic
from tests.idioms.modules import Classifier, Linear

TOPIC = Topic("Validation and test")


class History(Callback):
    """What validations have found."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


OPTIONS: dict[str, dict[str, Any]] = {
    "`val_check_interval=2`": {"val_check_interval": 2},
    "`val_check_interval=0.5`": {"val_check_interval": 0.5},
    "`val_check_interval=3` over epochs, `check_val_every_n_epoch=None`": {
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    },
    "`check_val_every_n_epoch=2`": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "`num_sanity_val_steps=2`": {"num_sanity_val_steps": 2},
    "`overfit_batches=2`": {"overfit_batches": 2},
    "`fast_dev_run=True`": {"fast_dev_run": True},
    "`inference_mode=False`": {"inference_mode": False},
}


def _options(options: dict[str, Any]) -> Any:
    def function(run: Run) -> Any:
        history = History()
        values = run.fit(Linear(), run.loader(), run.loader(30), callbacks=[history], **options)
        return {**values, "losses": history.losses}

    return function


for name, options in OPTIONS.items():
    TOPIC.idiom(name)(_options(options))


@TOPIC.idiom("`limit_val_batches=3`, and a sum over samples")
def limited(run: Run) -> Any:
    class Module(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("samples", float(len(batch["x"])), sync_dist=True, reduce_fx="sum")
            self.log("indices", batch["index"].double().sum(), sync_dist=True, reduce_fx="sum")

    return run.validate(Module(), run.loader(40), limit_val_batches=3)


@TOPIC.idiom("the samples of the sanity check")
def sanity(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.seen = PerSample()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.sanity_checking:
                self.seen.update(dict.fromkeys(batch["index"].tolist(), batch_idx))

    module = Module()
    run.fit(module, run.loader(), run.loader(40), num_sanity_val_steps=2)
    return {"seen": module.seen}


@TOPIC.idiom("`validate` and `test` after `fit`, with one Trainer")
def one_trainer(run: Run) -> Any:
    module, trainer = Linear(), run.trainer()
    trainer.fit(module, run.loader(), run.loader(30))
    validated = trainer.validate(module, run.loader(22), verbose=False)
    tested = trainer.test(module, run.loader(26), verbose=False)
    return {**validated[0], **tested[0]}


@TOPIC.idiom("`validate` between two calls of `fit`")
def validate_between(run: Run) -> Any:
    module = Linear()
    first = run.fit(module)
    between = run.validate(module, run.loader(30))
    second = run.fit(module)
    return {"first": first["parameters"], **between, "second": second["parameters"]}


@TOPIC.idiom("a callback collects the outputs of `validation_step` and logs their mean")
def outputs_in_a_callback(run: Run) -> Any:
    class Module(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.loss(batch)}

    class Collector(Callback):
        def on_validation_epoch_start(self, *_: Any) -> None:
            self.outs: list[torch.Tensor] = []

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.outs.append(outputs["loss"])

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.log("val_loss", torch.stack(self.outs).mean(), sync_dist=True)

    return run.validate(Module(), run.loader(32), callbacks=[Collector()])


@TOPIC.idiom("`test_step` returns a dict, read in `on_test_batch_end`")
def test_returns(run: Run) -> Any:
    class Module(Linear):
        def on_test_start(self) -> None:
            self.errors = PerSample()

        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return {"index": batch["index"], "error": self(batch["x"]) - batch["y"]}

        def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.errors.update(zip(outputs["index"].tolist(), outputs["error"].tolist(), strict=True))

    module = Module()
    run.test(module, run.loader(30))
    return {"errors": module.errors}


@TOPIC.idiom("several loaders, their values by `dataloader_idx`")
def several_loaders(run: Run) -> Any:
    return run.validate(Linear(), [run.loader(22), run.loader(30), run.loader(3)])


@TOPIC.idiom("several loaders, names of one's own with `add_dataloader_idx=False`")
def own_names(run: Run) -> Any:
    class Module(Linear):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            name = ("seen", "unseen")[dataloader_idx]
            self.log(f"{name}_loss", self.loss(batch), sync_dist=True, add_dataloader_idx=False)

    return run.validate(Module(), [run.loader(22), run.loader(30)])


@TOPIC.idiom("`CombinedLoader` in its mode `min_size`, pairs of batches")
def combined(run: Run) -> Any:
    class Module(Linear):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch["a"]) + self.loss(batch["b"]), batch_size=len(batch["a"]["x"]))

    return run.validate(Module(), CombinedLoader({"a": run.loader(24), "b": run.loader(32)}, "min_size"))


@TOPIC.idiom("gradients by the input in `validation_step`, `inference_mode=False`")
def input_gradients(run: Run) -> Any:
    class Module(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                x = batch["x"].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self(x).tanh().sum(), x)
            self.log("penalty", gradient.square().sum(1).mean(), sync_dist=True)

    return run.validate(Module(), run.loader(30), inference_mode=False)


@TOPIC.idiom("files in `trainer.log_dir`, written by a callback in `on_validation_batch_end`")
def log_dir(run: Run) -> Any:
    class Writer(Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            for index in batch["index"].tolist():
                Path(trainer.log_dir, f"{index}.txt").write_text(str(index))

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            (run.folder / "version_0").mkdir(exist_ok=True)

    logger = CSVLogger(run.folder, name="", version=0)
    trainer = run.trainer(callbacks=[Writer()], logger=logger)
    trainer.validate(Linear(), run.loader(30), verbose=False)
    trainer.strategy.barrier()
    return {"files": sorted(int(file.stem) for file in run.folder.rglob("*.txt"))}


class Exchanging:
    """Barrier, broadcast, gather and reduce."""

    def __init__(self, trainer: pl.Trainer, value: torch.Tensor) -> None:
        trainer.strategy.barrier()
        assert trainer.strategy.broadcast("message") == "message"
        self.gathered = trainer.strategy.all_gather(value).sum()
        self.sum = trainer.strategy.reduce(value, reduce_op="sum")  # in place


@TOPIC.idiom("`barrier`, `broadcast`, `all_gather` and `reduce` in `validation_step`")
def exchanges_in_step(run: Run) -> Any:
    class Module(Linear):
        def on_validation_start(self) -> None:
            self.sums: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            done = Exchanging(self.trainer, batch["y"].sum())
            self.sums.append([float(done.sum), float(done.gathered)])

    module = Module()
    run.validate(module, run.loader(32))
    return {"sums": module.sums}


@TOPIC.idiom("the same in `on_validation_batch_start` and `on_validation_batch_end` of a callback")
def exchanges_in_callback(run: Run) -> Any:
    class Exchanger(Callback):
        sums: tuple[Any, ...] = ()

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            self.sums += (float(Exchanging(trainer, batch["y"].sum()).sum),)

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            self.sums += (float(Exchanging(trainer, batch["y"].sum()).gathered),)

    callback = Exchanger()
    run.validate(Linear(), run.loader(32), callbacks=[callback])
    return {"sums": callback.sums}


@TOPIC.idiom("fewer samples than ranks")
def one_sample(run: Run) -> Any:
    class Module(Linear):
        def on_test_start(self) -> None:
            self.outs: list[torch.Tensor] = []

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.outs.append(self.loss(batch))
            self.log("test_loss", self.outs[-1], sync_dist=True)
            self.log("samples", float(len(batch["x"])), sync_dist=True, reduce_fx="sum")

        def on_test_epoch_end(self) -> None:
            self.log("mean", torch.stack(self.outs).mean(), sync_dist=True)

    return run.test(Module(), run.loader(1))


@TOPIC.idiom("`drop_last=True` in a validation loader")
def drop_last(run: Run) -> Any:
    # A batch of the loader is dropped; of 30 samples one process, whose batches are twice as large, would drop more.
    return run.validate(Linear(), run.loader(26, drop_last=True))


@TOPIC.idiom("true positives counted with `reduce_fx='sum'`, `torch.distributed.all_reduce` by hand at the end")
def counted(run: Run) -> Any:
    class Module(Classifier):
        def on_validation_epoch_start(self) -> None:
            self.hits = torch.zeros((), dtype=torch.float64)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            hits = (self(batch["x"]).argmax(1) == batch["label"]).sum().double()
            self.hits += hits
            self.log("logged", hits, sync_dist=True, reduce_fx="sum")

        def on_validation_epoch_end(self) -> None:
            if self.trainer.world_size > 1:
                dist.all_reduce(self.hits)
            self.log("by hand", self.hits)

    return run.validate(Module(), run.loader(30))


@TOPIC.idiom("step and epoch values of one name in validation")
def step_and_epoch(run: Run) -> Any:
    class Module(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), sync_dist=True, on_step=True, on_epoch=True)

    return {"epoch": run.validate(Module(), run.loader(30))["val_loss_epoch"]}


@TOPIC.idiom("`trainer.validate` on a checkpoint that `fit` has saved")
def validate_checkpoint(run: Run) -> Any:
    trainer, module = run.trainer(), Linear()
    trainer.fit(module, run.loader())
    trainer.save_checkpoint(run.folder / "model.ckpt")
    return trainer.validate(Linear(), run.loader(30), ckpt_path=run.folder / "model.ckpt", verbose=False)[0]
