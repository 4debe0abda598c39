"""Ranks may log different keys; what can't be combined, or logged at all, ends the run on all of them."""

import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_hetero import HeteroStrategy
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer


def numbers(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


class Uneven(Regression):
    """Ranks log different keys, at different times; rank 2 logs nothing in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.every = MulticlassConfusionMatrix(4)
        self.some = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == batch_idx:
            self.log(f"only_{batch_idx}", float(batch_idx), on_step=True, on_epoch=True, prog_bar=self.global_rank == 1)
        if self.global_rank == 1:
            self.log("one", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 2:
            return
        self.every.update(batch["x"][:, :4].float(), batch["label"])
        self.some.update(batch["x"][:, :4].float(), batch["label"])
        self.log("val_some", self.some)
        self.log("val_mean", batch["y"].mean())
        self.log("val_most", batch["y"].max(), reduce_fx="max")
        self.log("val_least", batch["y"].min(), reduce_fx="min")
        self.log("val_sum", float(len(batch["y"])), reduce_fx="sum")
        if self.global_rank == 1 and batch_idx == 1:
            self.log("val_first", batch["index"][0].double(), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        if self.global_rank == 1:
            self.log("val_end", 7.0)
        if self.global_rank == 0:
            self.log("own", 1.0, rank_zero_only=True, sync_dist=True)


def uneven() -> tuple[list[dict[str, float]], list[str], dict[str, float]]:
    module = Uneven()
    trainer = make_trainer(HeteroStrategy(shares=[2, 1, 1]), 3, max_epochs=2, log_every_n_steps=1)
    trainer.fit(module, numbers(36, 4), numbers(36, 4))
    fitted = {k: float(v) for k, v in trainer.callback_metrics.items()}
    returned = trainer.validate(module, numbers(36, 4), verbose=False)
    return [fitted, *returned], sorted(trainer.progress_bar_metrics), trainer.logged_metrics


def test_ranks_may_log_different_keys() -> None:
    """All have them at the end, also a rank that has logged nothing, and nothing waits or warns."""
    outs = run_ranks(3, uneven)
    y = Numbers(36).y
    # Three steps of 12 samples; each rank takes half, a quarter, a quarter.
    quarters = torch.tensor([i for i in range(36) if i % 12 < 9])  # of ranks 0 and 1
    for (fitted, validated), _, _ in outs:
        own = {k: v for k, v in fitted.items() if k != "own"}
        assert own == {k: v for k, v in outs[0][0][0].items() if k != "own"}
        assert [fitted[f"only_{i}"] for i in range(3)] == [0.0, 1.0, 2.0]
        assert [fitted[f"only_{i}_step"] for i in range(3)] == [0.0, 1.0, 2.0]
        assert fitted["val_end"] == validated["val_end"] == 7.0
        assert validated["val_mean"] == pytest.approx(float(y[quarters].mean()), rel=1e-12)
        assert validated["val_most"] == float(y[quarters].max())
        assert validated["val_least"] == float(y[quarters].min())
        assert validated["val_sum"] == 27
        assert validated["val_first"] == 18, "the first sample of rank 1 in the second step"
        assert "val_some" in validated
    assert ["own" in out[0][1] for out in outs] == [True, False, False], "rank_zero_only stays as it is"


class Wrong(Regression):
    """Logs something that is no number, or means different things by one key."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.table = MulticlassConfusionMatrix(4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.what == "different":
            self.log("value", 1.0, reduce_fx="max" if self.global_rank else "mean")
        elif self.what == "a text":
            self.log("value", "good" if self.global_rank else 1.0)
        else:
            scores = MetricCollection([self.table])
            scores.update(batch["x"][:, :4].float(), batch["label"])
            self.log("value", scores)


def wrong_fit(what: str) -> None:
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2, max_epochs=1)
    trainer.validate(Wrong(what), numbers(24, 6), verbose=False)


@pytest.mark.parametrize(
    ("what", "sentence", "ranks"),
    [
        ("a text", r"`self.log\(value, good\)` was called, but `str` values cannot be logged", [1]),
        ("different", r"ranks 0 and 1 log 'value' in different ways \(reduction='mean' and reduction='max'\)", [0, 1]),
        ("a collection", r"`self.log\(value, .*MetricCollection.* values cannot be logged", [0, 1]),
    ],
)
def test_what_can_not_be_logged_ends_the_run_on_all_ranks(what: str, sentence: str, ranks: list[int]) -> None:
    """With one sentence; a rank that is not to blame says which one is, or that the connection is lost."""
    errors = fails_on_ranks(2, wrong_fit, what)
    assert sorted(errors) == [0, 1]
    for rank in ranks:
        assert re.search(sentence, errors[rank], re.DOTALL), errors[rank]
