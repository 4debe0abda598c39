"""Validation, test and prediction: each sample once."""

import warnings
from itertools import chain
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    DataLoader,
)

from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, make_trainer, merged
from tests.trainer.loading import SIZE, OwnBatchesWithSize, Validating, loader, once, quiet


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.written: list[tuple[list[int], list[float]]] = []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        self.written.append((list(batch_indices), prediction.tolist()))


def evaluations() -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    quiet()
    world_size = torch.distributed.get_world_size()
    results: dict[str, Any] = {}
    module, writer = Validating(), Writer()
    trainer = make_trainer(HeteroStrategy(shares=[1, 5, 2]), world_size, max_epochs=1, callbacks=[writer])
    trainer.fit(module, loader(batch_size=8))
    for name, data in (
        ("in order", loader(batch_size=8)),
        ("one more", DataLoader(Numbers(49), batch_size=8)),
        ("as many as ranks", DataLoader(Numbers(3), batch_size=8)),
        ("workers", loader(batch_size=8, num_workers=1)),
        ("own batches", DataLoader(Numbers(SIZE), batch_sampler=OwnBatchesWithSize(SIZE, 4))),
        ("ones", DataLoader(Numbers(60), batch_size=1)),
    ):
        module.evaluated = []
        trainer.validate(module, data, verbose=False)
        results[name] = module.evaluated
        module.evaluated = []
        trainer.test(module, [data, data], verbose=False)
        results[f"test {name}"] = module.evaluated
        writer.written = []
        trainer.predict(module, data, return_predictions=False)
        results[f"predict {name}"] = writer.written
    combined = CombinedLoader([loader(batch_size=8)], "sequential")
    for name in ("combined", "combined again"):
        module.evaluated = []
        trainer.validate(module, combined, verbose=False)
        results[name] = module.evaluated
    with (
        pytest.warns(UserWarning, match="a step with fewer samples than there are ranks")
        if (torch.distributed.get_rank() == 0)
        else warnings.catch_warnings()
    ):
        module.evaluated = []
        trainer.validate(module, DataLoader(Numbers(2), batch_size=8), verbose=False)
        results["too few"] = module.evaluated
    return results


@once
def evaluated() -> list[dict[str, Any]]:
    return run_ranks(3, evaluations)


@pytest.mark.parametrize(
    ("name", "size"),
    [("in order", 61), ("one more", 49), ("as many as ranks", 3), ("workers", 61), ("own batches", 61), ("ones", 60)],
)
def test_each_sample_is_evaluated_once(name, size):
    parts = [result[name] for result in evaluated()]
    assert sorted(chain.from_iterable(chain.from_iterable(parts))) == list(range(size))
    assert len({len(part) for part in parts}) == 1, "all ranks take the same number of steps"
    if name != "own batches":
        assert list(chain.from_iterable(merged(parts))) == list(range(size))
    twice = [result[f"test {name}"] for result in evaluated()]
    assert sorted(chain.from_iterable(chain.from_iterable(twice))) == sorted(2 * [*range(size)])


@pytest.mark.parametrize("name", ["in order", "as many as ranks", "workers", "own batches"])
def test_predictions_come_with_their_indices(name):
    size = 3 if name == "as many as ranks" else 61
    truth = Numbers(size).y.tolist()
    written = list(chain.from_iterable(result[f"predict {name}"] for result in evaluated()))
    assert sorted(chain.from_iterable(indices for indices, _ in written)) == list(range(size))
    for indices, predictions in written:
        assert predictions == [truth[index] for index in indices]


def test_evaluation_of_a_users_combined_loader():
    for name in ("combined", "combined again"):
        parts = [result[name] for result in evaluated()]
        assert list(chain.from_iterable(merged(parts))) == list(range(SIZE))


def test_fewer_samples_than_ranks_are_repeated_with_a_warning():
    assert [result["too few"] for result in evaluated()] == [[[0]], [[0]], [[1]]]
