"""A second run of the same job begins where the first one ended."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import fails_on_ranks, run_ranks
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


def three_runs(folder: str) -> list[list[dict[str, Any]]]:
    return [
        fit(folder, 32),
        fit(folder, 32),  # finds the profile of the run before
        fit(f"{folder}/elsewhere", 32, shares=f"{folder}/run/version_0/hetero/profile.json"),
        fit(folder, 16),  # another job
    ]


def test_the_next_run_of_a_job_begins_with_what_was_learnt(tmp_path: Path) -> None:
    """In a folder of its own beside the first one's, or where it is told to look; another global batch begins anew."""
    first, second, third, other = run_ranks(2, three_runs, str(tmp_path))[0]
    assert {first[0]["reason"], other[0]["reason"]} <= {"equal", "probe"}, "as the machine's cores are just now"
    for begun in (second[0], third[0]):
        assert (begun["step"], begun["reason"]) == (0, "profile")
        assert begun["local_batches"][0] > 2 * begun["local_batches"][1]
        assert len(begun["predicted_seconds"]) == 2


def wrong_profile(folder: str) -> None:
    fit(folder, 32, steps=4)
    fit(folder, 16, shares=f"{folder}/run/version_0/hetero/profile.json")


def test_a_profile_of_another_job_is_refused_on_every_rank(tmp_path: Path) -> None:
    """Only rank 0 reads it; all say the same, and none waits for the others."""
    errors = fails_on_ranks(2, wrong_profile, str(tmp_path))
    assert sorted(errors) == [0, 1]
    for text in errors.values():
        assert "profile.json is of another job: global batch 32 there, 16 here" in text
