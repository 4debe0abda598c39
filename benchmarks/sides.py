"""The sides of a comparison: real Lightning runs that stay alive and train a few steps whenever it is their turn.

Each side is a set of processes of its own, one a rank, made anew from nothing but a description, so that sides share
no state. All of a rank's sides are pinned to the same core and held to the same quota; only one side runs at a time.
"""

import itertools
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from figures import Split
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from quotas import Quotas, idle_seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hetero import HeteroStrategy
from lightning_hetero.plan import Plan
from lightning_hetero.weighting import Rows, column

CLASSES = 10
_STORED = 512  # different images; more would only cost memory
_STEPS = 4000  # that an epoch is long: no side comes to the end of one
_TIMEOUT = timedelta(hours=1)


def _resnet18() -> Any:
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def _unet() -> Any:
    from segmentation_models_pytorch import Unet

    return Unet("resnet18", encoder_weights=None, classes=CLASSES)


MODELS = {"resnet18": _resnet18, "unet": _unet}
"""Classification of images, and of their pixels."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        model: a key of `MODELS`.
        size: pixels of an image's side.
        global_batch: samples of a step over all ranks.
    """

    model: str
    size: int
    global_batch: int


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Synthetic images in memory, with a class for each image or for each of its pixels."""

    def __init__(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(5)
        self._length = _STEPS * task.global_batch
        self._images = torch.randn(_STORED, 3, task.size, task.size, generator=generator)
        shape = (_STORED, task.size, task.size) if task.model == "unet" else (_STORED,)
        self._labels = torch.randint(CLASSES, shape, generator=generator)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index % _STORED], self._labels[index % _STORED]


class Classifier(pl.LightningModule):
    """Cross-entropy and SGD with momentum."""

    def __init__(self, model: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = MODELS[model]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Joined(ClusterEnvironment):
    """A cluster environment for ranks that have met already."""

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
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0


class Observed(HeteroStrategy):
    """Writes down what the strategy hears of all ranks, for which there is no public name; changes nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._notes: list[dict[str, Any]] = []

    def _hear(self, step: int, rows: Rows) -> None:
        assert self._planner is not None
        schedule = self._planner.schedule
        before = schedule.newest
        super()._hear(step, rows)
        measured = set(column(rows, "measured").astype(int).tolist())
        if len(measured) > 1 or measured == {-1}:
            return
        (told,) = measured
        note = {"step": told, "split": schedule.at(told).local_batches, "own": column(rows, "seconds").tolist()}
        new = schedule.newest
        if new is not before:
            note["then"] = {"split": new.local_batches, "from": new.first_step, "reason": new.reason}
            note["then"]["predicted"] = new.predicted_seconds
        self._notes.append(note)

    def told(self) -> list[dict[str, Any]]:
        """What was written down since it was last asked for."""
        notes, self._notes = self._notes, []
        return notes


class Pace(Callback):
    """Trains when it is told to, and says how long each step took.

    Args:
        connection: to the process that compares.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds: list[float] = []
        self._steps = 0
        self._last = 0.0
        self._cpu = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._connection.send(("ready", None))
        self._sleep(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        if len(self._seconds) == self._steps:
            cpu = time.process_time() - self._cpu
            observed = trainer.strategy.told() if isinstance(trainer.strategy, Observed) else []
            self._connection.send(("done", {"seconds": self._seconds, "observed": observed, "cpu": cpu}))
            self._seconds = []
            self._sleep(trainer)

    def _sleep(self, trainer: pl.Trainer) -> None:
        while True:
            command, argument = self._connection.recv()
            if command == "split":
                self._change(trainer.strategy, argument)
            elif command == "train":
                self._steps = argument
                self._cpu, self._last = time.process_time(), time.perf_counter()
                return

    def _change(self, strategy: Any, split: Split) -> None:
        """Another fixed split from the next step on; one run for all of them saves starting a new one for each."""
        planner = strategy._planner
        first = max(strategy._loaders.drawn() + 1, planner.schedule.newest.first_step)
        planner.schedule.append(Plan(first, split, reason="shares"))


def _trainer(strategy: Any, devices: int, connection: Connection) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[Joined()] if dist.is_initialized() else None,
        callbacks=[Pace(connection)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        default_root_dir=tempfile.gettempdir(),
    )


def _train(side: str, world_size: int, task: Task, connection: Connection) -> None:
    if side == "ddp":
        strategy: Any = "ddp"
    elif side == "hetero":
        strategy = Observed(global_batch=task.global_batch)
    elif side == "fixed":
        strategy = Observed(shares="equal", global_batch=task.global_batch)
    else:
        strategy = "auto"
    loader = DataLoader(Images(task), batch_size=task.global_batch // world_size, shuffle=True)
    _trainer(strategy, world_size, connection).fit(Classifier(task.model), loader)


def _rank(
    side: str, rank: int, world_size: int, core: int, task: Task, folder: str, connection: Connection
) -> None:  # in a process of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that compares hears it, and ends all others
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    tempfile.tempdir = folder
    try:
        if world_size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            meeting = (Path(folder) / "meeting").as_uri()
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        _train(side, world_size, task, connection)
    except (EOFError, BrokenPipeError):
        pass  # the process that compares is gone
    except BaseException:  # noqa: BLE001 - whatever it was, it is shown there
        connection.send(("error", traceback.format_exc()))
    os._exit(0)


class Side:
    """One side of a comparison, asleep until it is told to train.

    Args:
        name: "ddp", "hetero", "fixed" (hetero under a fixed split) or "alone".
        ranks: of the whole machine, that take part.
        cores: of all ranks of the machine.
        task: what is trained.
        quotas: to hold the ranks to.
    """

    _numbers = itertools.count()

    def __init__(self, name: str, ranks: Sequence[int], cores: Sequence[int], task: Task, quotas: Quotas) -> None:
        self.name = name
        self._cores = [cores[rank] for rank in ranks]
        self._watched = set(cores)
        self._quotas = quotas
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark")
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sides", "torchvision.models"])
        self._processes = []
        for number, core in enumerate(self._cores):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(name, number, len(ranks), core, task, self._folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._hear("ready")
        for rank, process in zip(ranks, self._processes, strict=True):
            assert process.pid is not None
            quotas.join(rank, process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def train(self, steps: int, split: Split | None = None) -> dict[str, Any]:
        """Train some steps.

        Args:
            steps: how many.
            split: of a "fixed" side, from the first of these steps on.

        Returns:
            seconds: each step's, as its first rank saw it.
            observed: what the strategy made of it, step by step; nothing for plain Lightning.
            foreign: the part of a core's time that went to processes that are not of the comparison, on the worst core.
        """
        idle, began = idle_seconds(), time.perf_counter()
        for connection in self._connections:
            if split is not None:
                connection.send(("split", split))
            connection.send(("train", steps))
        answers = self._hear("done")
        elapsed = time.perf_counter() - began
        # Idle cores of the comparison too: neighbours share caches, memory and often a physical core.
        foreign = {
            core: elapsed - seconds + idle[core] for core, seconds in idle_seconds().items() if core in self._watched
        }
        for core, answer in zip(self._cores, answers, strict=True):
            foreign[core] -= answer["cpu"]
        parts = [seconds / elapsed - self._quotas.taken.get(core, 0.0) for core, seconds in foreign.items()]
        result: dict[str, Any] = answers[0]
        return result | {"foreign": max(0.0, *parts)}

    def _hear(self, expected: str) -> list[Any]:
        """What all ranks have to say.

        Raises:
            RuntimeError: a rank failed.
        """
        heard: dict[int, Any] = {}
        while len(heard) < len(self._connections):
            missing = [c for number, c in enumerate(self._connections) if number not in heard]
            for connection in wait(missing):
                number = self._connections.index(connection)  # type: ignore[arg-type] # wait() returns what it was given
                try:
                    kind, value = self._connections[number].recv()
                except EOFError:
                    kind, value = "error", "it ended without a word"
                if kind != expected:
                    raise RuntimeError(f"rank {number} of {self.name} failed:\n{value}")
                heard[number] = value
        return [heard[number] for number in sorted(heard)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()
