"""A second run of the same job begins where the first one ended."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer


class Uneven(Regression):
    """Rank 1 does the same work eight times over."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(8 if self.global_rank == 1 else 1):
            for sample in batch["x"]:
                torch.linalg.matrix_exp(sample.outer(sample).repeat(8, 8) / 100)
        return super().training_step(batch, batch_idx)


def fit(folder: str, global_batch: int, shares: str = "auto", steps: int = 12) -> list[dict[str, Any]]:
    strategy = HeteroStrategy(shares=shares, global_batch=global_batch)
    trainer = make_trainer(strategy, 2, max_epochs=1, logger=CSVLogger(folder, name="run"))
    trainer.fit(Uneven(), DataLoader(Numbers(global_batch * steps), batch_size=global_batch // 2))
    lines = (Path(str(trainer.log_dir)) / "hetero" / "plan.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "plan"]


def runs(folder: str) -> tuple[list[list[dict[str, Any]]], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="the profile")
        events = [
            fit(folder, 32),
            fit(folder, 32),  # finds the profile of the run before
            fit(f"{folder}/elsewhere", 32, shares=f"{folder}/run/version_0/hetero/profile.json"),
            fit(folder, 16),  # another job
            fit(f"{folder}/other", 16, shares=f"{folder}/run/version_0/hetero/profile.json", steps=4),
        ]
    return events, [str(warning.message) for warning in caught if "the profile" in str(warning.message)]


def test_the_next_run_of_a_job_begins_with_what_was_measured(tmp_path: Path) -> None:
    """In a folder of its own beside the first one's, or where a profile is named; another global batch begins anew.

    Only the first rank reads files, and says so where it can't use one.
    """
    (events, said), (_, others) = run_ranks(2, runs, str(tmp_path))
    first, second, third, another, named = events
    assert {begun[0]["reason"] for begun in (first, another, named)} <= {"equal", "probe"}, "as the cores are just now"
    for begun in (second[0], third[0]):
        assert (begun["step"], begun["reason"]) == (0, "profile")
        assert begun["local_batches"][0] > 2 * begun["local_batches"][1]
        assert len(begun["predicted_seconds"]) == 2
    assert len(said) == 2
    for text in said:
        assert "profile.json is ignored: it is of another job, with global batch 32 there, 16 here" in text
    assert others == []
    profile = json.loads((tmp_path / "run" / "version_0" / "hetero" / "profile.json").read_text())
    assert profile["input_shape"] == "float64 (5,), float64 (), int64 ()"


def again_and_with_a_finder(folder: str) -> list[Any]:
    """Two fits of one strategy; then another run of the same job, which first looks for a learning rate."""
    strategy = HeteroStrategy(global_batch=32)
    trainer = make_trainer(strategy, 2, max_epochs=1, default_root_dir=folder)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(Uneven(), DataLoader(Numbers(32 * 8), batch_size=16))
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    strategy = HeteroStrategy(global_batch=32)
    trainer = make_trainer(strategy, 2, max_epochs=1, default_root_dir=folder, callbacks=[finder])
    trainer.fit(Uneven(), DataLoader(Numbers(32 * 8), batch_size=16))
    return [plan.reason for plan in strategy.job.planner_cache.current.schedule.plans]


def test_a_second_fit_writes_a_profile_that_holds_for_the_next_run(tmp_path: Path) -> None:
    """Whose shares are not measured anew before its first batch, where a learning rate is looked for first."""
    for reasons in run_ranks(2, again_and_with_a_finder, str(tmp_path)):
        assert reasons[0] == "profile"
        assert "equal" not in reasons
