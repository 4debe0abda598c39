"""The sides of a comparison: real Lightning runs that stay alive and train a few steps whenever it is their turn.

Each side is a set of processes of its own, one a rank, made anew from nothing but a description, so that sides share
no state. All of a rank's sides are pinned to the same core and held to the same quota; only one side runs at a time.
"""

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from figures import Split, steps_of
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from observing import Observer, change_split, observer_of
from quotas import Quotas, idle_seconds
from tasks import Classifier, Images, Task
from torch.utils.data import DataLoader
from validating import evaluate

from lightning_hetero import HeteroStrategy
from lightning_hetero.device import allocator as device_allocator

_TIMEOUT = timedelta(hours=1)
_LIBRARIES = {"resnet18": "torchvision.models", "unet": "segmentation_models_pytorch", "fcn": "torchgeo.models"}


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


class Pace(Callback):
    """Trains when it is asked to, and says how long each step took.

    Args:
        connection: to the process that compares.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds: list[float] = []
        self._steps = 0
        self._mark: int | None = None
        self._last = 0.0
        self._cpu = 0.0
        self._observer: Observer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observer = observer_of(trainer)
        self._connection.send(("ready", None))
        self._sleep(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        if len(self._seconds) == self._mark:
            self._connection.send(("mark", None))  # nobody waits
        if len(self._seconds) == self._steps:
            answer = {"seconds": self._seconds, "observed": [], "splits": []}
            answer |= {"cpu": time.process_time() - self._cpu, "peak": _peak_memory()}
            if self._observer is not None:
                answer |= self._observer.report()
            self._connection.send(("done", answer))
            self._seconds = []
            self._sleep(trainer)

    def _sleep(self, trainer: pl.Trainer) -> None:
        while True:
            command, argument = self._connection.recv()
            if command == "split":
                change_split(trainer.strategy, argument)
            elif command == "train":
                self._steps, self._mark = argument
                self._cpu, self._last = time.process_time(), time.perf_counter()
                return


def _peak_memory() -> int:
    """Most bytes that this process has had in main memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def set_allocator(allocator: str) -> bool:
    """Make the allocator of this process the same for whatever strategy runs in it.

    Args:
        allocator: "kept" sets it to keep freed memory; "default" also keeps the strategy from doing that.

    Returns:
        whether freed memory is kept.
    """
    if allocator == "kept":
        return device_allocator.keep_freed_memory()
    told = device_allocator.keep_freed_memory
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "lightning_hetero" and getattr(module, "keep_freed_memory", None) is told:
            module.keep_freed_memory = lambda: False  # type: ignore[attr-defined] # for whoever imported it by name too
    return False


def _trainer(strategy: Any, devices: int, connection: Connection | None) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[Joined()] if dist.is_initialized() else None,
        callbacks=[Pace(connection)] if connection is not None else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        default_root_dir=tempfile.gettempdir(),  # the side's own
    )


@dataclass(frozen=True)
class Setting:
    """What a rank's process is given of its machine.

    Attributes:
        allocator: see `set_allocator`.
        threads: of torch.
        pinned: it runs on its own core only; else wherever the system puts it, with its loader's workers.
        workers: of its loader.
    """

    allocator: str = "kept"
    threads: int = 1
    pinned: bool = True
    workers: int = 0


def _train(kind: str, world_size: int, task: Task, workers: int, connection: Connection) -> None:
    if kind == "ddp":
        strategy: Any = "ddp"
    elif kind == "hetero":
        strategy = HeteroStrategy(global_batch=task.global_batch)
    elif kind == "fixed":
        strategy = HeteroStrategy(shares="equal", global_batch=task.global_batch)
    else:
        strategy = "auto"
    if task.evaluation is not None:
        evaluate(_trainer(strategy, world_size, None), task, world_size, connection)
    # Workers end with their rank, which is killed: nobody asks them to.
    loader = DataLoader(Images(task), batch_size=task.global_batch // world_size, shuffle=True, num_workers=workers)
    _trainer(strategy, world_size, connection).fit(Classifier(task.model), loader)


def _rank(
    kind: str,
    rank: int,
    world_size: int,
    core: int,
    task: Task,
    setting: Setting,
    folder: str,
    connection: Connection,
) -> None:  # in a process of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that compares gets it too, and ends all others
    os.setpgid(0, 0)
    if setting.pinned:
        os.sched_setaffinity(0, {core})
    if not set_allocator(setting.allocator) and setting.allocator == "kept":
        connection.send(("error", "this C library's allocator can't be set to keep memory: use --allocator default"))
        os._exit(0)
    torch.set_num_threads(setting.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    tempfile.tempdir = folder
    try:
        if world_size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            meeting = (Path(folder) / "meeting").as_uri()
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        multiprocessing.set_start_method("fork", force=True)  # for workers, as torch has it by itself
        _train(kind, world_size, task, setting.workers, connection)
    except (EOFError, BrokenPipeError):
        pass  # the process that compares is gone
    except BaseException:  # noqa: BLE001 - whatever it was, it is shown there
        connection.send(("error", traceback.format_exc()))
    os._exit(0)


class Side:
    """One side of a comparison, paused until it is asked to train.

    Args:
        kind: "ddp", "hetero", "fixed" (hetero under a fixed split) or "alone".
        ranks: of the whole machine, that take part.
        cores: of all ranks of the machine.
        task: what is trained.
        quotas: to hold the ranks to.
        setting: of each rank's process.
    """

    def __init__(
        self,
        kind: str,
        ranks: Sequence[int],
        cores: Sequence[int],
        task: Task,
        quotas: Quotas,
        setting: Setting,
    ) -> None:
        self.kind = kind
        self.steps: list[dict[str, Any]] = []
        """All steps that it has trained: see `steps_of`; with each rank's `compute` time, known one step later, and
        `then`, the plan that was made of that."""
        self.paying: dict[str, Any] | None = None
        """What hetero says of ranks that do not pay, as of the last turn."""
        self.peaks: list[int] = []
        """The most memory in bytes that each rank has had, as of the last turn."""
        self._cores = [cores[rank] for rank in ranks]
        self._watched = set(cores)
        self._quotas = quotas
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark")
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sides", _LIBRARIES[task.model]])
        self._processes: list[Any] = []
        try:
            for number, core in enumerate(self._cores):
                ours, theirs = context.Pipe()
                rank = (kind, number, len(ranks), core, task, setting, self._folder.name, theirs)
                # A daemon may not have loader workers; `close` ends it in any case.
                process = context.Process(target=_rank, args=rank, daemon=setting.workers == 0)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
                quotas.join(ranks[number], process.pid)  # at once: a slow device is slow from the start
            self._receive("ready")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def train(
        self,
        steps: int,
        split: Split | None = None,
        *,
        mark: int | None = None,
        on_mark: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Train some steps.

        Args:
            steps: how many.
            split: of a "fixed" side, from the first of these steps on.
            mark: after so many of these steps `on_mark` is called, while training goes on.
            on_mark: see there.

        Returns:
            seconds: each step's, as its first rank saw it.
            foreign: the part of a core's time that went to processes that are not of the comparison, on the worst core.
        """
        idle, began = idle_seconds(), time.perf_counter()
        for number, connection in enumerate(self._connections):
            if split is not None:
                connection.send(("split", split))
            connection.send(("train", (steps, mark if number == 0 else None)))
        answers = self._receive("done", on_mark)
        elapsed = time.perf_counter() - began
        # Idle cores of the comparison too: neighbors share caches, memory and often a physical core.
        foreign = {
            core: elapsed - seconds + idle[core] for core, seconds in idle_seconds().items() if core in self._watched
        }
        for core, answer in zip(self._cores, answers, strict=True):
            foreign[core] -= answer["cpu"]
        parts = [seconds / elapsed - self._quotas.taken.get(core, 0.0) for core, seconds in foreign.items()]
        self.steps += steps_of(len(self.steps), answers[0])
        for note in answers[0]["observed"]:
            self.steps[note["step"]] |= note
        self.paying = answers[0].get("paying")
        self.peaks = [answer["peak"] for answer in answers]
        return {"seconds": answers[0]["seconds"], "foreign": max(0.0, *parts)}

    def _receive(self, expected: str, on_mark: Callable[[], None] | None = None) -> list[Any]:
        """What all ranks have to say.

        Raises:
            RuntimeError: a rank failed.
        """
        received: dict[int, Any] = {}
        while len(received) < len(self._connections):
            missing = [c for number, c in enumerate(self._connections) if number not in received]
            for connection in wait(missing):
                number = self._connections.index(connection)  # type: ignore[arg-type] # wait() returns what it was given
                try:
                    kind, value = self._connections[number].recv()
                except EOFError:
                    kind, value = "error", "it ended without an error message"
                if kind == "mark" and on_mark is not None:
                    on_mark()
                    continue
                if kind != expected:
                    raise RuntimeError(f"rank {number} of {self.kind} failed:\n{value}")
                received[number] = value
        return [received[number] for number in sorted(received)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # it may not have come to have a group of its own
                os.killpg(process.pid, signal.SIGKILL)  # with its loader's workers
            process.kill()
            process.join()
        self._folder.cleanup()
