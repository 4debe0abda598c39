"""What is logged when the batches of an epoch are over is the value over all samples."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer
from tests.trainer.loading import once

Found = dict[str, float]


class Ends(Callback):
    """A callback that logs the mean of what it has seen."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append(batch["index"].double().mean())

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        module.log("of a callback", torch.stack(self.seen).mean())
        self.seen.clear()


class Epochs(Regression):
    """The idiom that replaced `validation_epoch_end` and `training_epoch_end`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.head = nn.Linear(5, 4).double().requires_grad_(False)
        self.outs: list[torch.Tensor] = []
        self.trained: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append(batch["index"].double().mean())
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("of training", torch.stack(self.trained).mean())
        self.trained.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outs.append(cross_entropy(self.head(batch["x"]), batch["label"]))

    def on_validation_epoch_end(self) -> None:
        mean = torch.stack(self.outs).mean()
        self.log("with sync_dist", mean, sync_dist=True)
        self.log("without", mean)
        self.log("with a batch_size", mean, batch_size=100 if self.global_rank else 1)
        self.log("sum", torch.stack(self.outs).sum(), reduce_fx="sum", sync_dist=True)
        self.log("most", torch.stack(self.outs).max(), reduce_fx="max")
        self.log("least", torch.stack(self.outs).min(), reduce_fx=min)
        self.outs.clear()


def values(shares: list[int] | None) -> tuple[Found, list[list[float]]]:
    module, local = Epochs(), []

    class Keeps(Callback):
        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            local.append([float(out) for out in module.outs])

    strategy = HeteroStrategy(shares=shares) if shares else "auto"
    trainer = make_trainer(strategy, len(shares or [0]), callbacks=[Keeps(), Ends()], num_sanity_val_steps=0)
    trainer.fit(module, DataLoader(Numbers(40), batch_size=4), DataLoader(Numbers(30), batch_size=6))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, local


@once
def measured(*shares: int) -> tuple[list[Any], Any]:
    return run_ranks(2, values, list(shares)), run_ranks(1, values, None)[0]


@pytest.mark.parametrize("shares", [(3, 1), (9, 1)])
def test_a_mean_that_is_logged_at_an_epochs_end_is_that_of_all_samples(shares: tuple[int, ...]) -> None:
    """Each rank's weighs as many samples as it has had; batches of a rank are equally large."""
    ranks, (one, _) = measured(*shares)
    for found, _ in ranks:
        for name in ("with sync_dist", "without", "of training", "of a callback"):
            assert found[name] == pytest.approx(one[name], rel=1e-12), name
    assert ranks[0][0] == ranks[1][0]
    assert one["of training"] == 19.5


def test_a_batch_size_that_is_passed_is_the_weight() -> None:
    ranks, _ = measured(3, 1)
    (first, second) = (torch.tensor(local[-1], dtype=torch.float64).mean() for _, local in ranks)
    assert ranks[0][0]["with a batch_size"] == pytest.approx(float((first + 100 * second) / 101), rel=1e-12)


def test_sums_and_extremes_stay_those_of_all_ranks() -> None:
    ranks, _ = measured(3, 1)
    outs = ranks[0][1][-1] + ranks[1][1][-1]
    found = ranks[1][0]
    assert found["sum"] == pytest.approx(sum(outs))
    assert (found["most"], found["least"]) == pytest.approx((max(outs), min(outs)))


class Batches:
    """Four batches of `size` samples, in no DataLoader."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Numbers(4 * self.size), batch_size=self.size))

    def __len__(self) -> int:
        return 4


class Ranks(Regression):
    def on_train_epoch_end(self) -> None:
        self.log("rank", float(self.global_rank))


def of_own_batches() -> float:
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2)
    trainer.fit(Ranks(), Batches((3, 1)[torch.distributed.get_rank()]))
    return float(trainer.callback_metrics["rank"])


def test_a_rank_without_a_plan_weighs_as_many_samples_as_its_batches_hold() -> None:
    assert run_ranks(2, of_own_batches) == [0.25, 0.25]
