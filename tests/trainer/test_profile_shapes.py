"""A profile holds for samples of the shape that it was measured with."""

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import make_trainer

STEPS = 12


class AnySize(pl.LightningModule):
    """Takes images of any size; rank 1 does the same work eight times over."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for _ in range(8 if self.global_rank == 1 else 1):
            for _ in batch[0]:
                torch.linalg.matrix_exp(torch.ones(48, 48))
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: str, size: int, fits: int = 1) -> tuple[list[dict[str, Any]], list[str], int]:
    """The plans of a run, its warnings of profiles, and its steps."""
    trainer = make_trainer(HeteroStrategy(global_batch=32), 2, max_epochs=1, default_root_dir=folder)
    images = TensorDataset(torch.ones(32 * STEPS, 1, size, size))
    path = Path(folder) / "hetero" / "plan.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="the profile")
        for epochs in range(1, fits + 1):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(AnySize(), DataLoader(images, batch_size=16))
    events = [json.loads(line) for line in path.read_text().splitlines()[before:]]
    return (
        [event for event in events if event["event"] == "plan"],
        [str(warning.message) for warning in caught if "the profile" in str(warning.message)],
        trainer.global_step,
    )


def runs(folder: str) -> Any:
    found = [fit(folder, 8), fit(folder, 8), fit(folder, 12, fits=2)]
    profile = json.loads((Path(folder) / "hetero" / "profile.json").read_text())
    return found, profile["input_shape"]


def test_one_of_another_shape_is_left_aside_after_the_first_batch(tmp_path: Path) -> None:
    """With one warning on the first rank; shares are measured anew, and the next profile is of the new shape.

    Another fit of the same strategy neither warns nor measures anew again.
    """
    (first, shape), (second, _) = run_ranks(2, runs, str(tmp_path))
    (_, *nothing), (same, *nothing_again), (other, said, steps) = first
    assert nothing == nothing_again == [[], STEPS]
    assert steps == 2 * STEPS
    assert (same[0]["step"], same[0]["reason"]) == (0, "profile")
    assert same[0]["local_batches"][0] > 2 * same[0]["local_batches"][1]
    path = tmp_path / "hetero" / "profile.json"
    sentence = (
        f"the profile {path} is of samples of another shape (float32 (1, 8, 8); here float32 (1, 12, 12)), so the "
        "shares are measured anew"
    )
    assert said == [sentence]
    assert (other[0]["step"], other[0]["reason"]) == (0, "profile")
    assert (other[1]["reason"], other[1]["local_batches"]) == ("equal", [16, 16])
    assert len(other) > 2, "measured anew"
    assert other[-1]["local_batches"][0] > other[-1]["local_batches"][1]
    assert shape == "float32 (1, 12, 12)"
    assert [warned for _, warned, _ in second] == [[], [], []]
