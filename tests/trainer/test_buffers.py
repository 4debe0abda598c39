"""BatchNorm's statistics and other buffers: each rank's own during steps, the same wherever they are read."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lightning_hetero import HeteroStrategy
from lightning_hetero.step.batch_norm import pooled_statistics
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer


class Buffered(Regression):
    """BatchNorm, a frozen one, and buffers of other kinds that each rank fills with its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        frozen = nn.BatchNorm1d(8)
        frozen.running_mean = torch.randn(8)
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), frozen, nn.Tanh(), nn.LazyBatchNorm1d(), nn.Linear(8, 1)
        ).double()
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("odd", torch.zeros(3, dtype=torch.uint8))
        self.register_buffer("wide", torch.tensor(-1))
        self.register_buffer("sums", torch.zeros(2, 3, dtype=torch.float64).t())
        self.metric = SumMetric()
        self.metric.register_buffer("own", torch.zeros(1))
        self.before: list[Any] = []

    def configure_model(self) -> None:
        if not isinstance(self.net[4].running_mean, torch.Tensor) or self.net[4].has_uninitialized_params():
            self.net[4](torch.zeros(2, 8, dtype=torch.float64))
            self.net[4].reset_running_stats()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net[2].eval()
        loss = super().training_step(batch, batch_idx)
        self.flag.fill_(self.global_rank == 0)
        self.odd.add_(self.global_rank + 1)
        self.wide.fill_(2**60 + 1 + self.global_rank)
        self.sums.add_(float("nan") if self.global_rank else 1 / 3)
        self.metric.own.fill_(self.global_rank)
        self.before.append((self.net[1].running_mean.clone(), self.net[1].running_var.clone(), len(batch["x"])))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.net(batch["x"]).sum(), sync_dist=True, batch_size=len(batch["x"]))


class Statistics(Callback):
    """Keeps the statistics as a callback sees them when a validation begins and when training is over."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _read(self, module: Any) -> None:
        self.seen.append((module.net[1].running_mean.clone(), module.net[1].running_var.clone()))

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self._read(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._read(module)


def state_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def fit(options: dict[str, Any], size: int = 26, **trainer_options: Any) -> Any:
    module, statistics = Buffered(), Statistics()
    if torch.distributed.get_rank():
        module.net[1].running_mean.fill_(7.0)  # rank 0's is what all begin with
        module.wide.fill_(5)
    trainer = make_trainer(
        HeteroStrategy(**options), torch.distributed.get_world_size(), **({"max_epochs": 1} | trainer_options)
    )
    trainer.callbacks.append(statistics)
    trainer.fit(module, DataLoader(Numbers(size), batch_size=4), DataLoader(Numbers(8), batch_size=4))
    return {
        "state": state_of(module),
        "before": module.before,
        "statistics": statistics.seen,
        "frozen": Buffered().net[2].running_mean,
    }


def by_hand(outs: list[Any], steps: range) -> tuple[torch.Tensor, torch.Tensor]:
    counts = [sum(out["before"][step][2] for step in steps) for out in outs]
    last = [out["before"][steps[-1]] for out in outs]
    return pooled_statistics(
        torch.tensor(counts, dtype=torch.float64), torch.stack([s[0] for s in last]), torch.stack([s[1] for s in last])
    )


def test_statistics_are_merged_before_validation_and_at_the_end() -> None:
    """Two validations an epoch, and a last global batch: each time all samples since the last merge count."""
    outs = run_ranks(2, fit, {"shares": [3, 1]}, 48)
    for out in outs:
        assert len(out["before"]) == 6
        assert [entry[2] for entry in out["before"]] != []
        _, first, end = out["statistics"]  # the sanity check's, the epoch's, the end's
        for got in (first, end):
            for value, expected in zip(got, by_hand(outs, range(6)), strict=True):
                assert torch.equal(value, expected)
    own = [out["before"][-1][0] for out in outs]
    assert not torch.equal(*own), "during steps the statistics are each rank's own"


def test_every_buffer_is_the_same_on_all_ranks() -> None:
    """Bit by bit rank 0's, whatever their type; frozen statistics keep every bit; torchmetrics is left alone."""
    first, second, third = (out["state"] for out in run_ranks(3, fit, {"shares": [3, 1, 1]}, 31))
    for name, value in first.items():
        for other in (second, third):
            if name == "metric.own":
                continue
            torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    assert first["wide"] == 2**60 + 1
    assert first["flag"]
    assert first["sums"].flatten().tolist() == pytest.approx([1.0] * 6)
    assert [state["metric.own"].item() for state in (first, second, third)] == [0, 1, 2]
    assert first["net.1.num_batches_tracked"] == 3


def test_frozen_statistics_keep_every_bit() -> None:
    """A layer in evaluation mode has equal statistics everywhere, and they come out as they went in."""
    for out in run_ranks(2, fit, {"shares": [3, 1]}):
        assert torch.equal(out["state"]["net.2.running_mean"], out["frozen"].double())


def test_a_borrowed_step_counts_nothing() -> None:
    """26 samples: the last global batch has two, and rank 1 borrows both; they do not count."""
    outs = run_ranks(2, fit, {"shares": [3, 1]}, 26)
    counts = [[entry[2] for entry in out["before"]] for out in outs]
    assert sum(counts[0]) + sum(counts[1]) > 26, "something was borrowed"
    outs[1]["before"].pop()
    outs[1]["before"].append((*outs[1]["before"][-1][:2], 0))
    for out in outs:
        for value, expected in zip(out["statistics"][-1], by_hand(outs, range(len(counts[0]))), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)


def saved(folder: str, options: dict[str, Any]) -> Any:
    module = Buffered()
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = make_trainer(
        HeteroStrategy(**options), 2, max_epochs=1, callbacks=[checkpoint], enable_checkpointing=True
    )
    trainer.fit(module, DataLoader(Numbers(24), batch_size=4))
    return module.before


def test_checkpoints_hold_merged_statistics(tmp_path: Path) -> None:
    """Saved in the middle of an epoch, without any validation."""
    before = run_ranks(2, saved, str(tmp_path), {"shares": [3, 1]})
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    mean, variance = by_hand([{"before": entry} for entry in before], range(2))
    assert torch.equal(state["net.1.running_mean"], mean)
    assert torch.equal(state["net.1.running_var"], variance)


@pytest.mark.parametrize("name", ["broadcast_buffers", "forward_sync_buffers"])
def test_an_explicit_broadcast_is_ddps(name: str) -> None:
    """No merge: rank 0's statistics are copied before each forward pass, and differ afterwards."""
    if name not in inspect.signature(DistributedDataParallel.__init__).parameters:
        pytest.skip("this version of torch does not have the option")
    first, second = run_ranks(2, explicit, name)
    assert first["broadcasts"]
    assert second["broadcasts"]
    assert not torch.equal(first["mean"], second["mean"])


def explicit(name: str) -> Any:
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    strategy = HeteroStrategy(shares=[3, 1], **{name: True})
    out: dict[str, Any] = {}

    class Inside(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            out["broadcasts"] = strategy.model.broadcast_buffers

    module = Buffered()
    make_trainer(strategy, 2, max_epochs=1, callbacks=[Inside()]).fit(module, DataLoader(Numbers(24), batch_size=4))
    return out | {"mean": module.net[1].running_mean}


def options_of(options: dict[str, Any]) -> Any:
    strategy = HeteroStrategy(**options)
    seen: list[Any] = []

    class Inside(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            model = strategy.model
            seen.append((model.broadcast_buffers, model.gradient_as_bucket_view, state_of(module)))

    module = Buffered()
    if torch.distributed.get_rank():
        module.net[1].running_mean.fill_(7.0)
        module.wide.fill_(5)
    make_trainer(strategy, 2, max_epochs=1, callbacks=[Inside()]).fit(module, DataLoader(Numbers(24), batch_size=4))
    return seen[0]


def test_defaults_of_ddps_options() -> None:
    """No copy in forward, gradients are views of the buckets; all ranks begin with rank 0's buffers."""
    first, second = run_ranks(2, options_of, {})
    assert first[:2] == second[:2] == (False, True)
    for name, value in first[2].items():
        torch.testing.assert_close(second[2][name], value, rtol=0, atol=0, msg=name)


def test_what_the_user_passes_wins() -> None:
    """An explicit option is not replaced by our default."""
    for out in run_ranks(2, options_of, {"gradient_as_bucket_view": False}):
        assert out[:2] == (False, False)


class Growing(Buffered):
    """Its ranks hold buffers of different sizes, once trained."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.register_buffer("wide", torch.zeros(1 + self.global_rank))
        return Regression.training_step(self, batch, batch_idx)


def grown() -> None:
    make_trainer(HeteroStrategy(), 2, max_epochs=1).fit(Growing(), DataLoader(Numbers(24), batch_size=4))


def test_buffers_of_different_sizes_are_refused() -> None:
    """In one sentence on every rank, instead of a broken exchange."""
    for text in fails_on_ranks(2, grown).values():
        assert "buffers have different sizes on the ranks" in text


class FailsAlone(Buffered):
    """Rank 1 fails while rank 0 goes on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 2:
            raise ArithmeticError("my own mistake")
        return super().training_step(batch, batch_idx)


class SavesWhenInterrupted(Callback):
    """As OnExceptionCheckpoint does."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def failing(folder: str) -> None:
    path = f"{folder}/{torch.distributed.get_rank()}.ckpt"
    make_trainer(HeteroStrategy(), 2, max_epochs=1, callbacks=[SavesWhenInterrupted(path)]).fit(
        FailsAlone(), DataLoader(Numbers(24), batch_size=4)
    )


def test_a_checkpoint_at_an_exception_waits_for_nobody(tmp_path: Path) -> None:
    """A rank that fails saves while the others sit in another exchange; both come to their end."""
    errors = fails_on_ranks(2, failing, str(tmp_path))
    assert "my own mistake" in errors[1]
