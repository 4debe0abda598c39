"""Evaluation of what can't be cut, and of batches of which samples are left out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer
from tests.trainer.loading import once, quiet


class Stream(IterableDataset[Any]):
    """The samples of `Numbers`, the same on each rank; or each rank's own."""

    def __init__(self, size: int, *, sharded: bool = False) -> None:
        self.size, self.sharded = size, sharded

    def __iter__(self) -> Iterator[Any]:
        shards = torch.distributed.is_initialized() and self.sharded
        first, step = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shards else (0, 1)
        data = Numbers(self.size)
        return iter([data[index] for index in range(first, self.size, step)])


class Batches:
    """An iterable with a length that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Numbers(26), batch_size=4))

    def __len__(self) -> int:
        return 7


class Readable:
    """A collate function that leaves out the samples that can't be read."""

    def __init__(self, *unreadable: int) -> None:
        self.unreadable = unreadable

    def __call__(self, samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample["index"] not in self.unreadable])


LOADERS: dict[str, Any] = {
    "an iterable of batches": Batches,
    "a generator": lambda: (batch for batch in list(DataLoader(Numbers(26), batch_size=4))),
    "an iterable data set": lambda: DataLoader(Stream(26), batch_size=4),
    "an iterable data set, sharded by the user": lambda: DataLoader(Stream(26, sharded=True), batch_size=4),
    "unreadable samples": lambda: DataLoader(Numbers(26), batch_size=4, collate_fn=Readable(3, 5, 19)),
    "all of a rank's are unreadable": lambda: DataLoader(Numbers(26), batch_size=4, collate_fn=Readable(13, 25)),
}
LEFT_OUT = {"unreadable samples": {3, 5, 19}, "all of a rank's are unreadable": {13, 25}}


class Evaluated(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[list[int]] = []
        self.meets = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch["index"].tolist())
        if self.meets:
            self.trainer.strategy.barrier()  # all ranks are in step
        self.log("mean", batch["y"].mean())
        self.log("number", float(len(batch["y"])), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch["index"]


def evaluated(shares: list[int]) -> dict[str, Any]:
    quiet()
    found = {}
    for name, make in LOADERS.items():
        module = Evaluated()
        trainer = make_trainer(HeteroStrategy(shares=shares), 2)
        trainer.validate(module, make(), verbose=False)
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        predicted = [] if name == "a generator" else trainer.predict(module, make()) or []
        found[name] = module.evaluated, values, [index for batch in predicted for index in batch.tolist()]
    return found


@once
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, evaluated, [12, 1])


@pytest.mark.parametrize("name", LOADERS)
def test_each_sample_is_evaluated_once_and_all_ranks_take_the_same_steps(name: str) -> None:
    expected = [index for index in range(26) if index not in LEFT_OUT.get(name, ())]
    first, second = (result[name] for result in ranks())
    assert len(first[0]) == len(second[0]) == 4
    assert first[1] == second[1]
    assert first[1]["mean"] == pytest.approx(float(Numbers(26).y[expected].mean()), rel=1e-12)
    assert first[1]["number"] == len(expected)
    if name != "a generator":
        assert sorted(first[2] + second[2]) == expected


def unreadable() -> tuple[int, dict[str, float]]:
    quiet()
    module, trainer = Evaluated(), make_trainer(HeteroStrategy(shares=[3, 1]), 2)
    module.meets = False
    data = DataLoader(Numbers(4), batch_size=2, collate_fn=Readable(3))
    trainer.validate(module, data, verbose=False)
    return len(module.evaluated), {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_a_rank_of_which_nothing_is_left_evaluates_nothing() -> None:
    """There is no other batch that it could compute in its place."""
    expected = {"mean": pytest.approx(float(Numbers(4).y[:3].mean())), "number": 3.0}
    assert run_ranks(2, unreadable) == [(1, expected), (0, expected)]
