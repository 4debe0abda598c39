"""Files are written into folders that the user chose, never into the working directory on their own."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from lightning_hetero.trainer.profiles import run_folder
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer


@pytest.mark.parametrize(
    ("log_dir", "root", "chosen"),
    [
        ("logs/version_0", "{cwd}", "logs/version_0"),
        ("{cwd}/logs", "/root", "{cwd}/logs"),
        ("", "{cwd}", None),
        ("", "/root", "/root"),
        ("", ".", "."),
        (".", "{cwd}", None),
        (".", "/root", "/root"),
        ("./", "{cwd}", None),
        ("{cwd}", "{cwd}", None),
        (None, "{cwd}", None),
        (None, "/root", "/root"),
        ("s3://bucket/logs", "{cwd}", None),
        ("s3://bucket/logs", "/root", "/root"),
        ("", "s3://bucket", None),
    ],
)
def test_the_folder_that_the_user_chose(monkeypatch, tmp_path, log_dir, root, chosen):
    """An empty `log_dir` stands for a Trainer without loggers. A logger's working directory is its default."""
    monkeypatch.chdir(tmp_path)
    log_dir, root, chosen = (text and text.format(cwd=Path.cwd()) for text in (log_dir, root, chosen))
    loggers = [] if log_dir == "" else [object()]
    trainer = SimpleNamespace(
        loggers=loggers, log_dir=log_dir or root if not loggers else log_dir, default_root_dir=root
    )
    assert run_folder(trainer) == (chosen and Path(chosen))


class HereLogger(Logger):
    """As `WandbLogger` is by default: its folder is the working directory."""

    name = "here"
    version = "0"
    save_dir = "."

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def files(folder: str, options: dict[str, Any]) -> list[str]:
    """What a fit leaves in the working directory and below."""
    os.chdir(folder)
    strategy = HeteroStrategy(global_batch=8)
    trainer = make_trainer(strategy, 2, **{"default_root_dir": None, "max_epochs": 1} | options)
    trainer.fit(Regression(), DataLoader(Numbers(64), batch_size=4))
    trainer.strategy.barrier()
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


BOTH = ["hetero/plan.jsonl", "hetero/profile.json"]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, None),
        ({"logger": HereLogger()}, None),
        ({"default_root_dir": "root"}, "root"),
        ({"default_root_dir": "root", "logger": HereLogger()}, "root"),
        ({"logger": CSVLogger("logs", name="run")}, "logs/run/version_0"),
    ],
    ids=["neither", "logger-here", "root", "root-and-logger-here", "logger"],
)
def test_a_run_leaves_its_files_there_only(tmp_path, options, where):
    for left in run_ranks(2, files, str(tmp_path), options):
        assert [name for name in left if "hetero" in name] == ([f"{where}/{name}" for name in BOTH] if where else [])
        assert where is not None or left == [], "nothing in the working directory"
