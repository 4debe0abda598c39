"""What callbacks, schedulers and loggers read is the same on all ranks, and what one process would have."""

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer
from tests.trainer.modules import Classifier

SHARES = [5, 2, 1]
BATCH = 8  # of a rank; 24 is the global one


class Everything(Regression):
    """Logs in all ways and places, without `sync_dist` unless the name of the value says so."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.val_accuracy = MulticlassAccuracy(4, average="micro")
        self.confusion = MulticlassConfusionMatrix(4)
        self.table: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.log("began", float(self.current_epoch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch["x"]).squeeze(-1)
        loss = F.mse_loss(out, batch["y"])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("only_step", loss)
        self.log("synced", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("most", batch["y"].max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("least", batch["y"].min(), on_step=False, on_epoch=True, reduce_fx=min)
        self.log("sum", batch["y"].sum(), on_step=True, on_epoch=True, reduce_fx="sum")
        self.accuracy(batch["x"][:, :4].float(), batch["label"])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if batch_idx == 1:
            self.log("now_and_then", out.mean(), on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.log("late", outputs["loss"], on_step=True, on_epoch=False)

    def on_train_epoch_end(self) -> None:
        self.log("epoch_end", self.trainer.callback_metrics["loss_epoch"] * 2)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        out = self.net(batch["x"]).squeeze(-1)
        self.log("val_loss", F.mse_loss(out, batch["y"]), prog_bar=True)
        self.log("val_synced", F.mse_loss(out, batch["y"]), on_step=True, on_epoch=True, sync_dist=True)
        self.log("val_most", out.max(), reduce_fx="max")
        self.confusion.update(batch["x"][:, :4].float(), batch["label"])
        self.val_accuracy.update(batch["x"][:, :4].float(), batch["label"])
        self.log("val_accuracy", self.val_accuracy)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        if "val_loss" in self.trainer.callback_metrics:
            self.log("twice", self.trainer.callback_metrics["val_loss"] * 2)
        self.table.append(self.confusion.compute())
        self.confusion.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        by_epoch = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_epoch, "monitor": "val_loss"}}


class Looks(Callback):
    """Remembers what callbacks see, and logs a value of its own."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, float]]] = []

    def _look(self, when: str, trainer: Any) -> None:
        self.seen.append((when, {k: float(v) for k, v in trainer.callback_metrics.items()}))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._look("batch", trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.log("from_callback", trainer.callback_metrics["loss_epoch"] / 2)
        self._look("epoch", trainer)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self._look("validation", trainer)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self._look("validated", trainer)


def numbers(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


def logged_fit(strategy: Any, devices: int, batch_size: int, folder: str, **options: Any) -> dict[str, Any]:
    module, look = Everything(), Looks()
    best = ModelCheckpoint(folder, filename="{epoch}-{val_loss:.6f}", monitor="val_loss", save_top_k=2)
    steps = ModelCheckpoint(folder, filename="s{step}-{only_step:.6f}", monitor="only_step", every_n_train_steps=5)
    early = EarlyStopping("loss_epoch", min_delta=0.5, patience=1)
    trainer = make_trainer(
        strategy,
        devices,
        max_epochs=6,
        logger=CSVLogger(folder, version=0),
        callbacks=[look, best, steps, early],
        enable_checkpointing=True,
        log_every_n_steps=2,
        num_sanity_val_steps=-1,  # all batches, since those of one process are larger
        **options,
    )
    trainer.fit(module, numbers(94, batch_size), [numbers(50, batch_size)])
    validated = trainer.validate(module, numbers(50, batch_size), verbose=False)
    tested = trainer.test(module, [numbers(50, batch_size), numbers(31, batch_size)], verbose=False)
    return {
        "seen": look.seen,
        "epoch": trainer.current_epoch,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "best": (Path(best.best_model_path).name, float(best.best_model_score)),
        "steps": (Path(steps.best_model_path).name, float(steps.best_model_score)),
        "early": (early.stopped_epoch, float(early.best_score)),
        "table": [t.tolist() for t in module.table],
        "validated": validated,
        "tested": tested,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }


def rows(folder: str) -> list[dict[str, float]]:
    with (Path(folder) / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def on_ranks(folder: str, **options: Any) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    return logged_fit(HeteroStrategy(shares=SHARES), 3, BATCH, folder, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any], list[Any], list[Any]]:
    ours, plain = str(tmp_path_factory.mktemp("ours")), str(tmp_path_factory.mktemp("plain"))
    ranks = run_ranks(3, on_ranks, ours)
    return ranks, logged_fit("auto", 1, 24, plain), rows(ours), rows(plain)


def close(ours: Any, plain: Any) -> None:
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert ours[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key


def test_all_ranks_have_the_plain_runs_values(runs: Any) -> None:
    """Schedulers, EarlyStopping, ModelCheckpoint, and what validate and test return."""
    ranks, plain, _, _ = runs
    for rank in ranks:
        for name in ("epoch", "rate"):
            assert rank[name] == plain[name]
        for name in ("best", "steps"):
            assert rank[name][0] == plain[name][0]
        for name in ("best", "steps", "early"):
            assert rank[name][1] == pytest.approx(plain[name][1], rel=1e-12)
        assert rank["early"][0] == plain["early"][0] == 1, "it stopped before the last epoch"
        assert rank["table"][1:] == plain["table"][1:], "integers; what the sanity check sees is cut in other ways"
        close(rank["metrics"], plain["metrics"])
        for name in ("validated", "tested"):
            assert len(rank[name]) == len(plain[name])
            for ours, theirs in zip(rank[name], plain[name], strict=True):
                close(ours, theirs)
    assert plain["rate"] < 0.05, "the scheduler acted"


def test_callbacks_see_the_same_on_all_ranks(runs: Any) -> None:
    """In all hooks; and what one process would have, wherever values are looked at."""
    ranks, plain, _, _ = runs
    for others in ranks[1:]:
        assert others["seen"] == ranks[0]["seen"]
    batch = 0
    assert len(ranks[0]["seen"]) == len(plain["seen"])
    for (when, ours), (_, theirs) in zip(ranks[0]["seen"], plain["seen"], strict=True):
        if when == "batch":
            batch += 1
            if batch % 2:
                continue
        # What is logged in this hook itself, or after it, is seen after the next exchange.
        later = {"late", "from_callback"} if when == "epoch" else {"late"}
        close({k: v for k, v in ours.items() if k not in later}, {k: v for k, v in theirs.items() if k not in later})


def test_loggers_write_the_plain_runs_rows(runs: Any) -> None:
    """All but the steps of evaluation, which stay each rank's own."""
    _, _, ours, plain = runs
    ours = [row for row in ours if not any(k.startswith(("hetero/", "val_synced_step")) for k in row)]
    plain = [row for row in plain if not any(k.startswith("val_synced_step") for k in row)]
    assert len(ours) == len(plain) == 10
    for mine, theirs in zip(ours, plain, strict=True):
        close(mine, theirs)


class Drifting(Regression):
    """Even samples get worse from epoch to epoch, odd ones get better, and all together get better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        sign = 1 - 2 * (batch["index"] % 2).double()
        self.log("val_loss", ((sign - 0.1) * self.current_epoch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def drift() -> tuple[float, float]:
    from lightning_hetero import HeteroStrategy

    rates = []
    for strategy in (DDPStrategy(), HeteroStrategy(shares=[3, 1])):
        trainer = make_trainer(strategy, 2, max_epochs=3, num_sanity_val_steps=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
            trainer.fit(Drifting(), numbers(16, 4), numbers(16, 4))
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    return rates[0], rates[1]


def test_plain_ddps_learning_rates_drift_apart_and_ours_do_not() -> None:
    """ReduceLROnPlateau on a value without `sync_dist`: under DDP each rank goes by its own."""
    (ddp0, ours0), (ddp1, ours1) = run_ranks(2, drift)
    assert ddp0 < ddp1 == 0.1, "the ranks of plain DDP train with different learning rates from here on"
    assert ours0 == ours1 == 0.1


class Weighted(Classifier):
    """Its loss is a mean over summed class weights of valid targets; logs the loss in all ways."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.criterion(self.net(batch["x"]), batch["label"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("step", loss)
        self.log("own", loss, on_step=False, on_epoch=True, batch_size=3)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.criterion(self.net(batch["x"]), batch["label"]))


def weighted_fit(strategy: Any, devices: int, batch_size: int, folder: str) -> dict[str, float]:
    module = Weighted(weight=[0.2, 1.0, 2.0, 0.7], ignore_index=1)
    logger = CSVLogger(folder, version=0)
    trainer = make_trainer(strategy, devices, max_epochs=2, logger=logger, log_every_n_steps=1)
    trainer.fit(module, numbers(40, batch_size), numbers(40, batch_size))
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def weighted_on_ranks(folder: str) -> dict[str, float]:
    from lightning_hetero import HeteroStrategy

    return weighted_fit(HeteroStrategy(shares=[6, 1, 1]), 3, 3, folder)


def test_the_loss_is_weighted_by_its_count(tmp_path: Path) -> None:
    """As in one process: weighted sums over all ranks in a step, steps by their samples in an epoch."""
    ranks = run_ranks(3, weighted_on_ranks, str(tmp_path / "ours"))
    plain = weighted_fit("auto", 1, 9, str(tmp_path / "plain"))
    for rank in ranks:
        assert not any(math.isnan(value) for value in rank.values()), "ranks without valid targets leave no NaN"
        for key in ("loss", "loss_step", "loss_epoch", "step"):
            assert rank[key] == pytest.approx(plain[key], rel=1e-12), key
        assert rank["own"] != pytest.approx(plain["own"], rel=1e-3), "the user's own batch_size stays"
    ours = [row["loss_step"] for row in rows(str(tmp_path / "ours")) if "loss_step" in row]
    theirs = [row["loss_step"] for row in rows(str(tmp_path / "plain")) if "loss_step" in row]
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(ours) == 10


class BySteps(Regression):
    """A plateau scheduler by steps, and gradients gathered over two batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.05, factor=0.5)
        options = {"scheduler": scheduler, "monitor": "loss", "interval": "step", "frequency": 1}
        return {"optimizer": optimizer, "lr_scheduler": options}


class ByHand(BySteps):
    """Manual optimization; logs what it has not returned."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def stepped(strategy: Any, devices: int, batch_size: int, module: Any, **options: Any) -> dict[str, float]:
    trainer = make_trainer(strategy, devices, max_epochs=3, **options)
    trainer.fit(module, numbers(61, batch_size))
    rate = {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
    return {k: float(v) for k, v in trainer.callback_metrics.items()} | rate


SCENARIOS: list[tuple[Any, dict[str, Any]]] = [(BySteps, {"accumulate_grad_batches": 2}), (ByHand, {})]


def stepped_on_ranks() -> tuple[list[dict[str, float]], int]:
    from lightning_hetero import HeteroStrategy
    from lightning_hetero.exchange.groups import RankGroup
    from lightning_hetero.trainer.results import LOGGED_VALUES

    outs = [stepped(HeteroStrategy(shares=[3, 1]), 2, 6, module(), **options) for module, options in SCENARIOS]
    exchanges = []
    start = RankGroup.start

    def counted(self: RankGroup, row: Any, call: Any = "another call") -> Any:
        if getattr(call, "name", call) == LOGGED_VALUES:
            exchanges.append(len(row))
        return start(self, row, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankGroup, "start", counted)
        stepped(HeteroStrategy(shares=[3, 1]), 2, 2, ByHand())
    return outs, len(exchanges)


def test_schedulers_by_step_and_manual_optimization() -> None:
    """A scheduler by steps gets each step's global value; steps whose values nobody uses cost no exchange."""
    plain = [stepped("auto", 1, 12, module(), **options) for module, options in SCENARIOS]
    assert plain[0]["lr"] < 0.05, "the scheduler acted"
    for outs, exchanges in run_ranks(2, stepped_on_ranks):
        for ours, theirs in zip(outs, plain, strict=True):
            close(ours, theirs)
        # Three epochs of 31 steps: the last step of each, and the end of each before and after its hooks. The very
        # first step, since its keys are new; and once more each time that ranks learn of new keys.
        assert exchanges <= 3 * 3 + 6
