"""`trainer.log_dir`, a broadcast in Lightning, is the same path on all ranks in each hook of an evaluation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

Found = dict[str, list[Any]]
"""The paths that were read on one rank, by who read them."""


class Reader(Callback):
    """A callback that reads the path at the end of each evaluation batch."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def read(self, name: str, trainer: Any) -> None:
        self.found.setdefault(name, []).append(trainer.log_dir)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self.read("callback, sanity check" if trainer.sanity_checking else "callback, validation", trainer)

    def on_test_batch_end(self, trainer: Any, *_: Any) -> None:
        self.read("callback, test", trainer)

    def on_predict_batch_end(self, trainer: Any, *_: Any) -> None:
        self.read("callback, predict", trainer)


class Pictures(Regression):
    """A module that does so too, and in its validation step, as one does that saves pictures."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def read(self, name: str) -> None:
        self.found.setdefault(name, []).append(self.trainer.log_dir)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.read("step, sanity check" if self.trainer.sanity_checking else "step, validation")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.read("module, sanity check" if self.trainer.sanity_checking else "module, validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.read("step, test")

    def on_test_batch_end(self, *_: Any) -> None:
        self.read("module, test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["y"]

    def on_predict_batch_end(self, *_: Any) -> None:
        self.read("module, predict")


class Nowhere(Logger):
    """A logger that keeps nothing on this machine: it has no folder."""

    @property
    def name(self) -> str:
        return "nowhere"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, *_: Any, **__: Any) -> None: ...
    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


LOGGERS: dict[str, Callable[[str], Any]] = {
    "a logger": lambda folder: CSVLogger(folder, name="run"),
    "no logger": lambda _: False,
    "a logger without a folder": lambda _: Nowhere(),
}


def data(size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=4)


def read_in_fit(folder: str, logger: str, size: int) -> tuple[Found, Found, str]:
    """What is read within `fit`, and in `validate`, `test` and `predict` afterwards, and this rank's own root."""
    of_fit: Found = {}
    afterwards: Found = {}
    reader, module = Reader(of_fit), Pictures(of_fit)
    root = f"{folder}/root{dist.get_rank()}"
    trainer = make_trainer(
        HeteroStrategy(shares=[3, 1]),
        2,
        max_epochs=1,
        callbacks=[reader],
        logger=LOGGERS[logger](folder),
        default_root_dir=root,
    )
    trainer.fit(module, data(24), data(size))
    reader.found = module.found = afterwards
    trainer.validate(module, data(size), verbose=False)
    trainer.test(module, data(size), verbose=False)
    trainer.predict(module, data(size))
    return of_fit, afterwards, root


def expected(logger: str, folder: str, root: str) -> Any:
    return {"a logger": f"{folder}/run/version_0", "no logger": root}.get(logger)


@pytest.mark.parametrize("logger", LOGGERS)
def test_it_is_rank_0s_in_each_hook_of_an_evaluation_batch(tmp_path: Any, logger: str) -> None:
    """Without a logger each rank has another folder in this test, so that it shows whose is taken."""
    first, second = run_ranks(2, read_in_fit, str(tmp_path), logger, 30)
    path = expected(logger, str(tmp_path), first[2])
    in_fit = [f"{who}, validation" for who in ("callback", "step", "module")]
    in_fit += [f"{who}, sanity check" for who in ("callback", "step", "module")]
    later = [f"{who}, validation" for who in ("callback", "step", "module")]
    later += ["callback, test", "step, test", "module, test", "callback, predict", "module, predict"]
    for of_fit, afterwards, _ in (first, second):
        assert set(of_fit) == set(in_fit)
        assert set(afterwards) == set(later)
        for read in (*of_fit.values(), *afterwards.values()):
            assert set(read) == {path}


class OnRankZero(Callback):
    """Saves an image of each batch, on rank 0 only."""

    def __init__(self) -> None:
        self.paths: list[Any] = []

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.paths.append(trainer.log_dir)


def read_on_one_rank(folder: str) -> list[Any]:
    callback = OnRankZero()
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2, callbacks=[callback], logger=CSVLogger(folder, name="run"))
    trainer.validate(Pictures({}), data(30), verbose=False)
    return callback.paths


def test_one_rank_alone_may_read_it_in_a_batch(tmp_path: Any) -> None:
    assert run_ranks(2, read_on_one_rank, str(tmp_path)) == [4 * [f"{tmp_path}/run/version_0"], []]


def validated(folder: str, logger: str) -> Found:
    found: Found = {}
    trainer = make_trainer(
        HeteroStrategy(shares=[3, 1]),
        2,
        callbacks=[Reader(found)],
        logger=LOGGERS[logger](folder),
        default_root_dir=f"{folder}/root{dist.get_rank()}",
    )
    trainer.validate(Pictures(found), data(30), verbose=False)
    return found


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_validation_that_is_the_first_thing_that_a_process_does(tmp_path: Any, logger: str) -> None:
    path = expected(logger, str(tmp_path), str(tmp_path / "root0"))
    for found in run_ranks(2, validated, str(tmp_path), logger):
        assert set(found) == {"callback, validation", "step, validation", "module, validation"}
        assert all(set(read) == {path} for read in found.values())
