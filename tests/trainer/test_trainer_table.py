"""What docs/trainer.md promises of the Trainer's options: each against one plain process, on unequal shares."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer, parameters_of, plain_loader, relative_error
from tests.trainer.loading import once


def accumulation() -> dict[str, Any]:
    return {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})]}


def swa() -> dict[str, Any]:
    return {"callbacks": [StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)], "max_epochs": 3}


def ema() -> dict[str, Any]:
    return {"callbacks": [EMAWeightAveraging(decay=0.9, update_every_n_steps=1)]}


def timer() -> dict[str, Any]:
    return {"callbacks": [Timer("00:01:00:00")]}


# From the row of the table to the Trainer's options, made anew in each process.
SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "GradientAccumulationScheduler": accumulation,
    "StochasticWeightAveraging": swa,
    "WeightAveraging": ema,
    "Timer": timer,
    "gradient_clip_val": lambda: {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    "gradient_clip_algorithm": lambda: {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "precision='64-true'": lambda: {"precision": "64-true"},
    "detect_anomaly": lambda: {"detect_anomaly": True, "benchmark": True},
    "barebones": lambda: {"barebones": True},
    "how it runs": lambda: {
        "inference_mode": False,
        "profiler": "simple",
        "deterministic": True,
        "num_sanity_val_steps": 1,
        "max_time": "00:01:00:00",
    },
}
CLOSE = {"precision='bf16-mixed'": lambda: {"precision": "bf16-mixed", "max_epochs": 1}}


class Row(Regression):
    """In single precision where the Trainer is to change that; validates as well."""

    def __init__(self, name: str) -> None:
        super().__init__(torch.float32 if name.startswith("precision") else torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch["x"].to(self.net[0].weight.dtype), batch["y"].to(self.net[0].weight.dtype)
        return torch.nn.functional.mse_loss(self.net(x).squeeze(-1).to(y.dtype), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def one(name: str, make: Callable[[], dict[str, Any]], strategy: Any, devices: int, batch: int) -> dict[str, Any]:
    options = make()
    if options.get("barebones"):  # it refuses what it would switch off, even where that is off already
        options |= {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
        options |= {"enable_model_summary": None}
    module = Row(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*barebones.*")
        warnings.filterwarnings("ignore", message="Swapping scheduler")
        trainer = make_trainer(strategy, devices, **options)
        trainer.fit(module, plain_loader(batch), DataLoader(Numbers(8), 4))
    torch.use_deterministic_algorithms(False)
    return {"parameters": parameters_of(module), "step": trainer.global_step}


def rows_on_ranks() -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    return {name: one(name, make, HeteroStrategy(shares=[3, 1]), 2, 6) for name, make in (SAME | CLOSE).items()}


@once
def rows() -> list[dict[str, Any]]:
    return run_ranks(2, rows_on_ranks)


@pytest.mark.parametrize("name", SAME | CLOSE)
def test_an_option_means_what_it_means_in_one_process(name: str) -> None:
    alone = one(name, (SAME | CLOSE)[name], "auto", 1, 12)
    for result in (ran[name] for ran in rows()):
        assert result["step"] == alone["step"]
        assert relative_error(result["parameters"], alone["parameters"]) <= (1e-2 if name in CLOSE else 1e-12)


# ---- tuners, checkpoints ----


def finds_a_rate(strategy: Any, devices: int, batch: int) -> tuple[float, Any]:
    module = Row("")
    finder = LearningRateFinder(num_training_steps=24, update_attr=True, early_stop_threshold=None)
    trainer = make_trainer(strategy, devices, callbacks=[finder], max_epochs=5)
    trainer.fit(module, plain_loader(batch))
    return module.lr, parameters_of(module)


def checkpoints(folder: str, strategy: Any, devices: int, batch: int) -> list[str]:
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = make_trainer(strategy, devices, callbacks=[saving], enable_checkpointing=True, max_epochs=1)
    trainer.fit(Row(""), plain_loader(batch))
    return sorted(path.name for path in Path(folder).glob("*.ckpt"))


def tuners_on_ranks(folder: str) -> dict[str, Any]:
    from lightning_hetero import HeteroStrategy

    size = dist.get_world_size()
    results: dict[str, Any] = {"checkpoints": checkpoints(folder, HeteroStrategy(shares=[3, 1]), size, 6)}
    results["rate"] = finds_a_rate(HeteroStrategy(shares=[3, 1]), size, 6)
    with pytest.raises(MisconfigurationException) as refused:
        make_trainer(HeteroStrategy(), size, callbacks=[BatchSizeFinder()]).fit(Row(""), plain_loader(6))
    results["batch size"] = str(refused.value)
    with warnings.catch_warnings():  # only rank 0 warns
        warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU.*")
        results["fp16"] = make_trainer(HeteroStrategy(), size, precision="16-mixed").precision
    return results


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, tuners_on_ranks, str(tmp_path_factory.mktemp("checkpoints")))


def test_the_learning_rate_finder_finds_what_it_finds_in_one_process(tuned: list[dict[str, Any]]) -> None:
    rate, parameters = finds_a_rate("auto", 1, 12)
    assert rate != 0.05
    for result in tuned:
        assert result["rate"][0] == pytest.approx(rate, rel=1e-9)
        assert relative_error(result["rate"][1], parameters) <= 1e-9


def test_checkpoints_come_at_the_same_steps(tuned: list[dict[str, Any]], tmp_path: Path) -> None:
    assert checkpoints(str(tmp_path), "auto", 1, 12) == tuned[0]["checkpoints"] == [f"step={n}.ckpt" for n in (2, 4, 6)]


def test_what_is_refused_is_refused_in_one_sentence(tuned: list[dict[str, Any]]) -> None:
    for result in tuned:
        assert "Batch size finder is not supported with distributed strategies" in result["batch size"]
        assert result["fp16"] == "bf16-mixed", "on CPUs Lightning takes bfloat16, and says so"


# ---- compiled modules ----


class Compiled(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.fast = [torch.compile(self.net, backend="aot_eager")]  # in a list: the parameters stay those of `net`

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.mse_loss(self.fast[0](batch["x"]).squeeze(-1), batch["y"])


class OtherSizes(Compiled):
    """Another batch size in each epoch, so another plan."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sizes: list[int] = []

    def train_dataloader(self) -> Any:
        epoch = self.current_epoch + 1
        part = torch.utils.data.Subset(Numbers(60), range(20 * epoch))
        return DataLoader(part, 10 * epoch // self.ranks)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch["y"]))
        return super().training_step(batch, batch_idx)


def compiled(strategy: Any, devices: int) -> tuple[Any, list[int], int]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    module = OtherSizes(devices)
    make_trainer(strategy, devices, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    return parameters_of(module), module.sizes, counters["stats"]["unique_graphs"]


def compiled_on_ranks() -> tuple[Any, list[int], int]:
    from lightning_hetero import HeteroStrategy

    return compiled(HeteroStrategy(shares=[3, 1]), 2)


def test_a_compiled_module_is_compiled_for_its_first_size_and_once_for_all_others() -> None:
    alone, _, _ = compiled("auto", 1)
    for (parameters, sizes, graphs), seen in zip(
        run_ranks(2, compiled_on_ranks), ([8, 8, 15, 15, 23, 23], [2, 2, 5, 5, 7, 7]), strict=True
    ):
        assert sizes == seen, "three plans"
        assert graphs == 2
        assert relative_error(parameters, alone) <= 1e-12


# ---- several runs in one process ----


class Part(IterableDataset[Any]):
    """Each rank's own samples."""

    def __iter__(self) -> Any:
        return iter(Numbers(48)[i] for i in range(dist.get_rank(), 48, 2))


def groups_of_reloads() -> list[int]:
    from lightning_hetero import HeteroStrategy

    made: list[int] = []
    new_group = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made[-1] += 1
        return new_group(*args, **kwargs)

    dist.new_group = counted
    for epochs in (1, 3):
        made.append(0)
        module = Regression()
        module.train_dataloader = lambda: DataLoader(Part(), 4)
        options = {"max_epochs": epochs, "reload_dataloaders_every_n_epochs": 1}
        make_trainer(HeteroStrategy(shares=[3, 1]), 2, **options).fit(module)
    return made


def test_a_reloaded_iterable_data_set_keeps_its_group() -> None:
    for once_loaded, thrice_loaded in run_ranks(2, groups_of_reloads):
        assert once_loaded == thrice_loaded


class Failing(Regression):
    def __init__(self, at_start: bool) -> None:
        super().__init__()
        self.at_start = at_start

    def on_train_start(self) -> None:
        if self.at_start:
            raise LookupError("the first run's mistake")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 1:
            raise ArithmeticError("the second run's mistake")
        return super().training_step(batch, batch_idx)


def fails_twice() -> None:
    from lightning_hetero import HeteroStrategy

    with pytest.raises(LookupError):
        make_trainer(HeteroStrategy(), 2).fit(Failing(at_start=True), plain_loader(6))
    make_trainer(HeteroStrategy(), 2).fit(Failing(at_start=False), plain_loader(6))


def test_a_second_failure_is_not_taken_for_the_first() -> None:
    errors = fails_on_ranks(2, fails_twice)
    assert "rank 1 (cpu) failed first: ArithmeticError: the second run's mistake" in errors[0].splitlines()[-1]
