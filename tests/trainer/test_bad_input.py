"""Bad input ends the run on every rank, with one sentence that says what was wrong and what to do."""

import re
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hetero.exchange.waits import Waits
from lightning_hetero.trainer import job
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, make_trainer, relative_error
from tests.trainer.modules import Classifier, Manual


def sized(size: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shares": [1, -2]}, r"the share of rank 1 is -2"),
        ({"shares": [float("nan"), 1]}, r"the share of rank 0 is nan"),
        ({"shares": [0, 0]}, r"add up to 0"),
        ({"shares": "fastest"}, r"shares='fastest' is unknown"),
        ({"shares": 3}, r"one number per rank"),
        ({"global_batch": 0}, r"at least 1 sample"),
        ({"global_batch": 2.5}, r"whole number"),
        ({"granularity": 0}, r"granularity=0"),
        ({"memory_limit": -1.0}, r"memory_limit=-1"),
    ],
)
def test_arguments_are_checked_when_the_strategy_is_made(options: dict[str, Any], sentence: str) -> None:
    """Before any process is started."""
    from lightning_hetero import HeteroStrategy

    with pytest.raises(ValueError, match=sentence):
        HeteroStrategy(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shares": [1, 2, 3]}, r"has 3 numbers, but there are 2 ranks"),
        ({"shares": [1]}, r"has 1 number, but there are 2 ranks"),
        ({"global_batch": 1}, r"global_batch=1 is smaller than the number of ranks, 2"),
    ],
)
def test_arguments_are_checked_against_the_devices(options: dict[str, Any], sentence: str) -> None:
    """When the Trainer is made, before it starts the other ranks."""
    from lightning_hetero import HeteroStrategy

    with pytest.raises(ValueError, match=sentence):
        pl.Trainer(accelerator="cpu", devices=2, strategy=HeteroStrategy(**options), logger=False)


def test_a_strategy_belongs_to_one_trainer() -> None:
    """Fit and then test with the same Trainer works; a second Trainer is refused."""
    from lightning_hetero import HeteroStrategy

    strategy = HeteroStrategy()
    pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(ValueError, match="already belongs to a Trainer"):
        pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)


def test_other_accelerators_are_refused() -> None:
    """Only CPUs and CUDA GPUs can be driven."""
    from lightning_hetero.trainer.options import check_devices

    with pytest.raises(ValueError, match="not on xla"):
        check_devices([torch.device("cpu"), torch.device("xla", 0)])


def test_more_ranks_than_cores_is_a_warning() -> None:
    """It works, but the ranks slow each other down."""
    with pytest.warns(UserWarning, match=r"1024 CPU ranks share \d+ core"):
        pl.Trainer(accelerator="cpu", devices=1024, strategy="hetero", logger=False)


class Frozen(Regression):
    """Nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)


class Fetching(Regression):
    """Fetches its batches by itself, which Lightning warns about."""

    def __init__(self) -> None:
        super().__init__()
        warnings.filterwarnings("ignore", message=".*`dataloader_iter`")

    def training_step(self, dataloader_iter: Any) -> Any:
        raise AssertionError("it is not called")


def by_rank(batch_size: int) -> DataLoader[Any]:
    return sized(20 + torch.distributed.get_rank(), batch_size)


def no_batch_size(batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(20), batch_size=None)


@pytest.mark.parametrize(
    ("recipe", "strategy", "sentence"),
    [
        (Recipe(loader=by_rank), {}, r"length of the data set: 20 on rank 0, 21 on rank 1"),
        (Recipe(loader=no_batch_size), {}, r"batch_size=None and no batch sampler"),
        (Recipe(loader=partial(sized, 5, drop_last=True), batch_size=3), {}, r"no batches: .* global batch of 6"),
        (Recipe(loader=partial(sized, 20), batch_size=3), {"granularity": 4}, r"multiple"),
        (Recipe(module=Fetching), {}, r"training_step\(dataloader_iter\) fetches its batches by itself"),
        (Recipe(module=Frozen), {}, r"Frozen has no trainable parameters"),
    ],
)
def test_what_is_only_found_in_the_run(recipe: Recipe, strategy: dict[str, Any], sentence: str) -> None:
    """Every rank raises the same sentence."""
    errors = fails_on_ranks(2, hetero_fit, recipe, strategy)
    assert len(errors) == 2
    for text in errors.values():
        assert re.search(sentence, text.splitlines()[-1]), text


class Odd(Classifier):
    """Counts oddly on rank 1 in batch 2."""

    def __init__(self, value: Any) -> None:
        super().__init__(declares=False)
        self.value = value

    def loss_count(self, batch: Any) -> Any:
        odd = self.global_rank == 1 and self.global_step == 2
        return self.value if odd else 1.0


@pytest.mark.parametrize(
    ("value", "own", "others"),
    [
        (-3, r"global batch 2 is -3 on rank 1", r"global batch 2 is -3 on rank 1"),
        (float("nan"), r"global batch 2 is nan on rank 1", r"global batch 2 is nan on rank 1"),
        (float("inf"), r"is inf on rank 1", r"is inf on rank 1"),
        (torch.ones(2), r"tensor of shape \(2,\)", r"nan on rank 1"),
        ("many", r"'many'; it has to be a number", r"nan on rank 1"),
    ],
)
def test_odd_loss_counts(value: Any, own: str, others: str) -> None:
    """The error names the rank, the batch and the value, on all ranks."""
    errors = fails_on_ranks(2, hetero_fit, Recipe(module=partial(Odd, value)), {})
    assert re.search(own, errors[1].splitlines()[-1]), errors[1]
    assert re.search(others, errors[0]), errors[0]


class Leaves(Regression):
    """Rank 1 goes its own way in batch 2."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def _odd(self, batch_idx: int) -> bool:
        return self.global_rank == 1 and batch_idx == 2

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.way == "leaves" and self._odd(batch_idx) else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self._odd(batch_idx):
            if self.way == "stops":
                self.trainer.should_stop = True
            if self.way == "none":
                return None
            if self.way == "raises":
                raise ArithmeticError("my own mistake")
            if self.way == "words":
                raise RuntimeError("DataLoader timed out after 30 seconds: /data/igloo/tile.tif")
        return super().training_step(batch, batch_idx)


LEFT = r"rank 0 is in (the training step of|fetching) global batch 2; rank 1 is in the end of the epoch"


@pytest.mark.parametrize(
    ("way", "rank0", "rank1"),
    [
        ("leaves", LEFT, LEFT),
        (
            "words",
            r"rank 1 \(cpu\) failed first: RuntimeError: DataLoader timed",
            r"RuntimeError: DataLoader timed out",
        ),
        ("raises", r"rank 1 \(cpu\) failed first: ArithmeticError: my own mistake", r"ArithmeticError: my own"),
    ],
)
def test_one_rank_alone(way: str, rank0: str, rank1: str) -> None:
    """No hang: both ranks end, and rank 0 says what rank 1 did."""
    errors = fails_on_ranks(2, hetero_fit, Recipe(module=partial(Leaves, way)), {})
    assert re.search(rank0, errors[0].splitlines()[-1]), errors[0]
    assert re.search(rank1, errors[1]), errors[1]


@pytest.mark.parametrize("way", ["stops", "none"])
def test_one_rank_alone_that_goes_on_with_the_others(way: str) -> None:
    """`should_stop` on one rank stops all of them, and a batch that a rank skips doesn't count."""
    recipe = Recipe(module=partial(Leaves, way))
    first, second = run_ranks(2, hetero_fit, recipe, {})
    assert first["step"] == second["step"]
    assert relative_error(first["parameters"], second["parameters"]) == 0
    assert (first["step"] < 10) == (way == "stops")


class Skips(Manual):
    """Rank 1 makes no backward pass in batch 2."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank != 1 or batch_idx != 2:
            super().training_step(batch, batch_idx)


def impatient(recipe: Recipe) -> dict[str, Any]:
    """Ranks look into a wait that takes a third of a second, not only into one of five."""
    job.Waits = partial(Waits, long=0.3, interval=0.1)  # in this process, which ends with the test
    return hetero_fit(recipe, {})


def test_one_rank_alone_skips_a_backward_pass() -> None:
    """In manual optimization nothing stops it; the others would wait for its gradients for ever."""
    errors = fails_on_ranks(2, impatient, Recipe(module=Skips))
    sentence = (
        r"rank 0 \(cpu\) is in the backward pass of global batch 2, while rank 1 \(cpu\) is in .*: "
        r"rank 1 \(cpu\) skipped a backward pass"
    )
    for text in errors.values():
        assert re.search(sentence, text.splitlines()[-1]), text


def leaves_together(way: str) -> int:
    recipe = Recipe(module=partial(Together, way), max_epochs=1)
    return hetero_fit(recipe, {})["step"]


class Together(Leaves):
    """All ranks go that way."""

    def _odd(self, batch_idx: int) -> bool:
        return batch_idx == 2


def test_leaving_together_is_allowed() -> None:
    """What all ranks do alike behaves as in one process."""
    assert run_ranks(2, leaves_together, "leaves") == [2, 2]
    assert run_ranks(2, leaves_together, "stops") == [3, 3]


class Lists:
    """A loader of ready batches, other ones on each rank and one fewer on rank 1."""

    def __iter__(self) -> Any:
        data, rank = Numbers(24), torch.distributed.get_rank()
        for start in range(12 * rank, 12 + 9 * rank, 3):
            yield torch.utils.data.default_collate([data[i] for i in range(start, start + 3)])


def ready_batches(batch_size: int) -> Any:
    return Lists()


def test_a_loader_that_ends_on_one_rank() -> None:
    """Loaders that the strategy does not split need equally many batches on every rank; otherwise ranks would hang."""
    errors = fails_on_ranks(2, hetero_fit, Recipe(loader=ready_batches), {})
    assert "rank 1 is in the end of the epoch" in errors[0]


def fit_then_test() -> Any:
    from lightning_hetero import HeteroStrategy

    module = Evaluated()
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2)
    trainer.fit(module, sized(20, 4))
    trainer.test(module, sized(10, 2), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, sized(20, 4))
    return module.tested, float(trainer.callback_metrics.get("error", 0.0)), trainer.current_epoch


class Evaluated(Regression):
    """Has a test step."""

    def __init__(self) -> None:
        super().__init__()
        self.tested: list[int] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.tested += batch["index"].tolist()


def test_fit_then_test_then_fit_with_one_trainer() -> None:
    """The same strategy object serves all runs of its Trainer; each test sample is seen exactly once."""
    outs = run_ranks(2, fit_then_test)
    assert sorted(outs[0][0] + outs[1][0]) == list(range(10))
    assert [out[2] for out in outs] == [3, 3]
