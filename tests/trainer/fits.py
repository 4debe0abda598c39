"""Short real trainings, for comparison between ranks and with one plain process."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Joined(ClusterEnvironment):
    """A cluster environment for ranks whose process group exists already."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "none"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return torch.distributed.get_rank()

    def node_rank(self) -> int:
        return 0


def make_trainer(strategy: Any, devices: int, **options: Any) -> pl.Trainer:
    """A quiet Trainer; `devices` ranks that have met already, or one plain process for strategy "auto"."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "default_root_dir": tempfile.mkdtemp(),
    }
    if strategy != "auto":
        settings["plugins"] = [Joined()]
    return pl.Trainer(**(settings | options))


class Numbers(Dataset[Any]):
    """`size` samples of `width` features, a real target, a class, and their own index."""

    def __init__(self, size: int, width: int = 5, classes: int = 4, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, width, generator=generator, dtype=dtype)
        self.y = torch.randn(size, generator=generator, dtype=dtype)
        self.label = torch.randint(classes, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "label": self.label[index], "index": index}


class Regression(pl.LightningModule):
    """A small network on `Numbers`; remembers the indices that it was trained on."""

    def __init__(self, dtype: torch.dtype = torch.float64, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.lr = lr
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        return nn.functional.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def parameters_of(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest difference in proportion to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


class Recipe:
    """What to train: made anew in each process.

    Args:
        module: makes the LightningModule.
        loader: from the batch size to the training loader(s).
        batch_size: of the loader under ranks; the single process gets the global batch.
        trainer: further options of the Trainer.
    """

    def __init__(
        self,
        module: Callable[[], pl.LightningModule] = Regression,
        loader: Callable[[int], Any] | None = None,
        batch_size: int = 6,
        **trainer: Any,
    ) -> None:
        self.module = module
        self.loader = loader or plain_loader
        self.batch_size = batch_size
        self.trainer = trainer


def plain_loader(batch_size: int) -> DataLoader[Any]:
    """61 samples in order."""
    return DataLoader(Numbers(61), batch_size=batch_size)


def hetero_fit(recipe: Recipe, strategy: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank under `HeteroStrategy(**strategy)`."""
    from lightning_hetero import HeteroStrategy

    world_size = torch.distributed.get_world_size()
    module = recipe.module()
    chosen = HeteroStrategy(**strategy)
    trainer = make_trainer(chosen, **{"devices": world_size} | recipe.trainer)
    trainer.fit(module, recipe.loader(recipe.batch_size))
    return {
        "parameters": parameters_of(module),
        "seen": getattr(module, "seen", None),
        "plan": chosen.job.planner_cache.newest_split(),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "step": trainer.global_step,
    }


def keep_counts_on_device() -> None:
    """Let the host never read loss counts in this process, as on CUDA; here the device is a CPU."""
    from lightning_hetero.step.step import StepContext

    StepContext.counts_on_device = property(lambda _: True)


def plain_fit(recipe: Recipe, global_batch: int) -> dict[str, Any]:
    """Train in this one process with plain Lightning."""
    module = recipe.module()
    trainer = make_trainer("auto", **{"devices": 1} | recipe.trainer)
    trainer.fit(module, recipe.loader(global_batch))
    return {
        "parameters": parameters_of(module),
        "seen": getattr(module, "seen", None),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "step": trainer.global_step,
    }


def merged(seen: Iterable[Sequence[Sequence[int]]]) -> list[list[int]]:
    """What all ranks trained on, step by step; the caller accounts for borrowed samples."""
    return [[index for part in parts for index in part] for parts in zip(*seen, strict=True)]
