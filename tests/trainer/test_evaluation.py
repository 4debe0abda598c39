"""Validation, test and prediction: each sample once, on one rank, in steps that all ranks take."""

import warnings
from itertools import chain, zip_longest
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, make_trainer
from tests.trainer.loading import SIZE, OwnBatchesWithSize, UnsizedSampler, Validating, loader, once, quiet


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.written: list[tuple[list[int], list[float]]] = []
        self.epoch: list[Any] = []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        self.written.append((list(batch_indices), prediction.tolist()))

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices) -> None:
        self.epoch = [(list(i), p.tolist()) for i, p in zip(batch_indices[0], predictions, strict=True)]


class Ends(Callback):
    """Counts the hooks at the end of an evaluation, which no rank may leave out."""

    def __init__(self) -> None:
        self.ends = 0

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.ends += 1

    def on_validation_end(self, *_: Any) -> None:
        self.ends += 1


CASES: dict[str, Any] = {
    "in order": lambda: loader(batch_size=8),
    "one more": lambda: DataLoader(Numbers(49), batch_size=8),
    "as many as ranks": lambda: DataLoader(Numbers(3), batch_size=8),
    "two": lambda: DataLoader(Numbers(2), batch_size=8),
    "one": lambda: DataLoader(Numbers(1), batch_size=8),
    "workers": lambda: loader(batch_size=8, num_workers=1),
    "own batches": lambda: DataLoader(Numbers(SIZE), batch_sampler=OwnBatchesWithSize(SIZE, 4)),
    "ones": lambda: DataLoader(Numbers(60), batch_size=1),
    "without a length": lambda: loader(sampler=UnsizedSampler(), batch_size=8),
}
TESTED = ("in order", "two", "one")
SIZES = {"one more": 49, "as many as ranks": 3, "two": 2, "one": 1, "ones": 60}


def evaluations() -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    quiet()
    world_size = torch.distributed.get_world_size()
    results: dict[str, Any] = {}
    module, writer, ends = Validating(), Writer(), Ends()
    trainer = make_trainer(HeteroStrategy(shares=[1, 5, 2]), world_size, max_epochs=1, callbacks=[writer, ends])
    trainer.fit(module, loader(batch_size=8))
    for name, make in CASES.items():
        data = make()
        module.evaluated = []
        trainer.validate(module, data, verbose=False)
        results[name] = module.evaluated
        if name in TESTED:
            module.evaluated = []
            trainer.test(module, [data, data], verbose=False)
            results[f"test {name}"] = module.evaluated
        writer.written = []
        returned = trainer.predict(module, data)
        results[f"predict {name}"] = writer.written
        results[f"predict {name}, epoch"] = writer.epoch
        results[f"predict {name}, returned"] = [batch.tolist() for batch in returned]
    results["ends"] = ends.ends
    combined = CombinedLoader([loader(batch_size=8)], "sequential")
    for name in ("combined", "combined again"):
        module.evaluated = []
        trainer.validate(module, combined, verbose=False)
        results[name] = module.evaluated
    module.evaluated = []
    trainer.validate(module, loader(batch_size=8, drop_last=True), verbose=False)
    results["drop_last"] = module.evaluated
    return results


@once
def evaluated() -> list[dict[str, Any]]:
    return run_ranks(3, evaluations)


def in_order(parts: list[list[Any]]) -> list[Any]:
    """What W ranks have evaluated, step by step, and in each step in the order of the ranks."""
    return [one for step in zip_longest(*parts, fillvalue=[]) for batch in step for one in batch]


@pytest.mark.parametrize("name", CASES)
def test_each_sample_is_evaluated_once(name):
    """In the order of the stream; with fewer samples than ranks, the others borrow one."""
    size = SIZES.get(name, SIZE)
    parts = [result[name] for result in evaluated()]
    assert len({len(part) for part in parts}) == 1, "all ranks take the same steps"
    assert all(batch for part in parts for batch in part)
    indices = in_order(parts)
    if size < 3:
        assert sorted(set(indices)) == list(range(size))
        assert [len(part) for part in parts] == [1, 1, 1]
        return
    assert sorted(indices) == list(range(size))
    if name in ("in order", "one more", "workers", "ones"):
        assert indices == list(range(size))
    if name in TESTED:
        twice = [result[f"test {name}"] for result in evaluated()]
        assert sorted(in_order(twice)) == sorted(2 * [*range(size)])


def test_all_ranks_come_to_the_end():
    assert [result["ends"] for result in evaluated()] == 3 * [2 * len(CASES)]


def test_steps_follow_the_shares():
    """61 samples are 3 steps of 24 at most, each split by shares of 1, 5 and 2; a batch of one stays one."""
    batches = [result["in order"] for result in evaluated()]
    assert [[len(batch) for batch in own] for own in batches] == [[2, 2, 2], [14, 13, 13], [5, 5, 5]]
    assert [{len(batch) for batch in result["ones"]} for result in evaluated()] == 3 * [{1}]


def test_drop_last_is_respected():
    parts = [result["drop_last"] for result in evaluated()]
    assert sorted(chain.from_iterable(chain.from_iterable(parts))) == list(range(56))


@pytest.mark.parametrize("name", list(CASES))
def test_predictions_come_with_their_indices(name):
    size = SIZES.get(name, SIZE)
    truth = Numbers(size).y.tolist()
    written = list(chain.from_iterable(result[f"predict {name}"] for result in evaluated()))
    assert sorted(chain.from_iterable(indices for indices, _ in written)) == list(range(size))
    for indices, predictions in written:
        assert predictions == [truth[index] for index in indices]
    for result in evaluated():
        assert result[f"predict {name}, epoch"] == result[f"predict {name}"]
        assert result[f"predict {name}, returned"] == [values for _, values in result[f"predict {name}"]]


def test_evaluation_of_a_users_combined_loader():
    for name in ("combined", "combined again"):
        parts = [result[name] for result in evaluated()]
        assert in_order(parts) == list(range(SIZE))


# --------------------------------------------------------------------------- limits, sanity check, loaders side by side


class Side(Validating):
    """Remembers what is paired."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batches = batch.items() if isinstance(batch, dict) and "x" not in batch else [("", batch)]
        self.evaluated.append([(name, None if one is None else one["index"].tolist()) for name, one in batches])


def limited(strategy: str) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    quiet()
    hetero = strategy != "auto"
    world_size = torch.distributed.get_world_size() if hetero else 1
    results: dict[str, Any] = {}

    def run(name: str, data: Any, *, fit: bool = False, **options: Any) -> None:
        module = Side()
        chosen = HeteroStrategy(shares=[3, 1]) if hetero else "auto"
        trainer = make_trainer(chosen, world_size, max_epochs=1, **options)
        if fit:
            trainer.fit(module, loader(batch_size=8), data)
        else:
            trainer.validate(module, data, verbose=False)
        results[name] = module.evaluated

    run("int", loader(batch_size=8), limit_val_batches=3)
    run("float", loader(batch_size=8), limit_val_batches=0.5)
    run("sanity", loader(batch_size=8), fit=True, num_sanity_val_steps=3, check_val_every_n_epoch=2)
    for mode in ("min_size", "max_size", "max_size_cycle"):
        times = 1 if hetero else 2  # one process has the batches of two ranks
        pair = {"a": loader(batch_size=8 * times), "b": DataLoader(Numbers(17), batch_size=6 * times)}
        run(mode, CombinedLoader(pair, mode))
    return results


@once
def limits() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return run_ranks(2, limited, "hetero"), run_ranks(1, limited, "auto")[0]


@pytest.mark.parametrize(("name", "steps"), [("int", 3), ("float", 2), ("sanity", 3)])
def test_limits_count_steps_of_all_ranks(name, steps):
    """As under plain DDP: each takes the batches of all ranks, so these samples are twice those of one process."""
    ranks, _ = limits()
    parts = [[indices for batch in result[name] for _, indices in batch] for result in ranks]
    assert [len(part) for part in parts] == [steps, steps]
    assert in_order(parts) == list(range(16 * steps))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_side_by_side_stay_paired(mode):
    """Each step pairs what one process pairs with the batches of both ranks: 16 and 12 samples."""
    ranks, one = limits()
    found = []
    for step in zip(*(result[mode] for result in ranks), strict=True):
        names = [name for name, _ in step[0]]
        found.append([(name, [i for part in step for i in dict(part)[name] or []]) for name in names])
    assert found == [[(name, indices or []) for name, indices in batch] for batch in one[mode]]


# ---------------------------------------------------------------------------------------------------------- exchanges


class Exchanging(Validating):
    """Has a buffer that DDP would broadcast in each forward, and exchanges in each step, as under plain DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.exchanged: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch["index"].tolist())
        self.log("step", batch["y"].mean(), on_step=True, on_epoch=False, sync_dist=True)
        strategy, rank = self.trainer.strategy, self.global_rank
        self.exchanged.append(
            (
                self.all_gather(torch.tensor(float(rank))).tolist(),
                strategy.broadcast(("of rank", rank)),
                float(strategy.reduce(torch.tensor(float(rank)), reduce_op="sum")),
            )
        )
        strategy.barrier()

    on_validation_batch_end = on_validation_batch_start = lambda self, *_: self.exchanged.append(
        self.all_gather(torch.tensor(float(self.global_rank))).tolist()
    )


def exchanging() -> list[Any]:
    from lightning_hetero import HeteroStrategy

    quiet()
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    warnings.filterwarnings("ignore", message="a step of the val loader has fewer samples")
    found = []
    for size, options in ((30, {}), (1, {"broadcast_buffers": True})):
        module = Exchanging()
        trainer = make_trainer(HeteroStrategy(shares=[1, 4], **options), 2, max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(module, loader(batch_size=8), DataLoader(Numbers(size), batch_size=4))
        found.append((module.exchanged, module.evaluated))
    return found


def test_what_a_module_exchanges_in_an_evaluation_batch_is_right():
    """Also where a rank borrows a sample, and where DDP would broadcast buffers in its forward."""
    ends = [0.0, 1.0]
    of_a_batch = [ends, (ends, ("of rank", 0), 1.0), ends]
    for (many, evaluated_many), (one, evaluated_one) in run_ranks(2, exchanging):
        assert many == 4 * of_a_batch
        assert len(evaluated_many) == 4
        assert one == of_a_batch
        assert evaluated_one == [[0]]


# ----------------------------------------------------------------------------------------------------------- measuring


class Ticks:
    """A clock on which a batch takes as many seconds as this rank says."""

    def __init__(self, seconds: float) -> None:
        self.seconds_of_a_batch, self.time = seconds, 0.0

    def now(self) -> float:
        self.time += self.seconds_of_a_batch
        return self.time

    def has_passed(self, point: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


def measuring(shares: Any) -> list[int]:
    from lightning_hetero import HeteroStrategy
    from lightning_hetero.trainer import job

    quiet()
    rank = torch.distributed.get_rank()

    # In this process, which ends with the test.
    job.device_clock = lambda _: Ticks((1.0, 4.0)[rank])
    module = Validating()
    trainer = make_trainer(HeteroStrategy(shares=shares), 2)
    seen = []

    def run(call: Any, size: int) -> None:
        module.evaluated = []
        call(module, DataLoader(Numbers(size), batch_size=2), verbose=False)
        seen.append(list(chain.from_iterable(module.evaluated)))

    for call in (trainer.validate, trainer.validate, trainer.test):
        run(call, 40)
    run(trainer.validate, 3)
    run(trainer.validate, 40)
    return [len(indices) for indices in seen]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [("auto", ([20, 30, 20, 2, 30], [20, 10, 20, 1, 10])), ("equal", ([20, 20, 20, 2, 20], [20, 20, 20, 1, 20]))],
    ids=str,
)
def test_the_next_evaluation_is_split_by_the_times_of_the_last(shares, expected):
    """For each stage separately; fixed shares stay."""
    assert tuple(run_ranks(2, measuring, shares)) == expected


# ----------------------------------------------------------------------------------------------------------- plain DDP


class Counting(Validating):
    def __init__(self) -> None:
        super().__init__()
        self.confusion = MulticlassConfusionMatrix(4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch["index"].tolist())
        self.confusion.update(batch["label"], batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.matrix = self.confusion.compute()


def counting(strategy: str) -> tuple[list[int], list[int]]:
    import lightning_hetero  # noqa: F401 - makes "hetero" known

    quiet()
    warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")  # it says what follows
    module = Counting()
    trainer = make_trainer(strategy, 2)
    trainer.validate(module, DataLoader(Numbers(61), batch_size=8), verbose=False)
    return list(chain.from_iterable(module.evaluated)), module.matrix.diagonal().tolist()


def test_plain_ddp_pads_and_hetero_does_not():
    truth = torch.bincount(Numbers(61).label, minlength=4).tolist()
    padded = run_ranks(2, counting, "ddp")
    assert sorted(chain.from_iterable(indices for indices, _ in padded)) == sorted([*range(61), 0])
    assert all(sum(matrix) == 62 for _, matrix in padded)
    exact = run_ranks(2, counting, "hetero")
    assert sorted(chain.from_iterable(indices for indices, _ in exact)) == list(range(61))
    assert all(matrix == truth for _, matrix in exact)


# ----------------------------------------------------------------------------------------------------- out of memory


class Large(Validating):
    """Runs out of memory where a batch has more than 5 samples."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if len(batch["y"]) > 5:
            raise MemoryError("no more pages")


def too_large() -> None:
    from lightning_hetero import HeteroStrategy

    make_trainer(HeteroStrategy(shares=[3, 1]), 2).validate(Large(), loader(batch_size=4), verbose=False)


def test_a_fast_rank_that_runs_out_of_memory_says_what_to_do():
    error = fails_on_ranks(2, too_large)[0].splitlines()[-1]
    assert "rank 0 (cpu) ran out of memory at a local batch of 6" in error
    assert "choose a smaller batch_size for it (no more pages)" in error
