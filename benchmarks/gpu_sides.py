"""The sides of the comparison on a GPU: Lightning runs whose ranks share one, and are paused until it is their turn."""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from figures import Split
from lightning.pytorch.callbacks import Callback
from observing import Observer, change_split, observer_of
from sides import Joined
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_hetero import HeteroStrategy

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_BANDS, _CLASSES, _STORED, _STEPS = 13, 10, 256, 4000
_TIMEOUT = timedelta(minutes=10)


class OneGpu(Joined):
    """Each rank is a node of its own, whose only GPU is the machine's first."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return dist.get_rank()


class Patches(Dataset[Any]):
    """Synthetic 13-band patches in pinned memory: a batch is a slice, so that the GPU does not wait for the host."""

    def __init__(self, size: int, length: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self._length = length
        images = torch.randint(256, (_STORED, _BANDS, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(_CLASSES, (_STORED, size, size), generator=generator, dtype=torch.uint8)
        self._images, self._labels = images.pin_memory(), labels.pin_memory()

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        first = indices[0] % (_STORED - len(indices) + 1)
        chosen = slice(first, first + len(indices))
        return self._images[chosen], self._labels[chosen]


class Segmentation(pl.LightningModule):
    """A fully convolutional network of five layers, the shape of TorchGeo's FCN; little to communicate."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for number in range(5):
            layers += [nn.Conv2d(filters if number else _BANDS, filters, 3, padding=1), nn.LeakyReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.Conv2d(filters, _CLASSES, 1))

    def loss_count(self, batch: Any) -> Any:
        """Pixels that are not ignored: only the device knows."""
        return (batch[1] != 0).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images.float() / 255), labels.long(), ignore_index=0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Competitor:
    """Keeps products of matrices queued on a stream of its own, as another job on this rank's GPU would.

    Args:
        side: of the matrices. Products of small ones leave a part of the GPU free, those of large ones nothing.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._queued = max(4, 64 * 1024**3 // side**3)  # a few milliseconds of them
        self._on = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def set(self, *, on: bool) -> None:
        """Work, or rest."""
        (self._on.set if on else self._on.clear)()

    def _work(self) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            matrix = torch.randn(self._side, self._side, device="cuda")
            while True:
                self._on.wait()
                for _ in range(self._queued):
                    matrix @ matrix
                stream.synchronize()  # lets other threads run meanwhile


class Pace(Callback):
    """Trains when it is asked to, and says how long that took."""

    def __init__(self, connection: Connection, competitor: Competitor | None) -> None:
        self._connection = connection
        self._competitor = competitor
        self._left = 0
        self._began = 0.0
        self._profiler: Any = None
        self._observer: Observer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observer = observer_of(trainer)
        self._connection.send(("ready", None))
        self._sleep(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._left -= 1
        if self._left:
            return
        calls: Counter[str] = Counter()
        if self._profiler is not None:
            self._profiler.stop()
            calls = Counter(event.name for event in self._profiler.events())
            self._profiler = None
        torch.cuda.synchronize()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - self._began}
        answer["peak"] = torch.cuda.max_memory_allocated()
        answer["waits"] = {name: calls[name] for name in WAITS}
        answer["launches"] = calls["cudaLaunchKernel"]
        if self._observer is not None:
            answer |= self._observer.report()
        if self._competitor is not None:
            self._competitor.set(on=False)
        self._connection.send(("done", answer))
        self._sleep(trainer)

    def _sleep(self, trainer: pl.Trainer) -> None:
        while True:
            command, argument = self._connection.recv()
            if command == "split":
                change_split(trainer.strategy, argument)
                continue
            if self._competitor is not None:
                self._competitor.set(on=True)
            self._left = argument
            if command == "profile":
                kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
                self._profiler = torch.profiler.profile(activities=kinds)
                self._profiler.start()
            self._began = time.perf_counter()
            return


@dataclass(frozen=True)
class Job:
    """What is trained, and by whom.

    Attributes:
        kind: "ddp", "hetero" or "fixed" (hetero under a fixed split).
        ranks: that share the GPU.
        competitor: side of the matrices that other work on the last rank's GPU multiplies; None for no such work.
        global_batch: samples of a step.
        size: pixels of a patch's side.
        filters: of the network.
    """

    kind: str
    ranks: int
    competitor: int | None
    global_batch: int
    size: int
    filters: int


def _rank(job: Job, rank: int, folder: str, connection: Connection) -> None:  # in a process of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    tempfile.tempdir = folder
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(job.ranks))
        backend = "nccl" if job.ranks == 1 else "gloo"
        meeting = (Path(folder) / "meeting").as_uri()
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=job.ranks, timeout=_TIMEOUT)
        strategy: Any = "ddp"
        if job.kind != "ddp":
            strategy = HeteroStrategy(shares="auto" if job.kind == "hetero" else "equal", global_batch=job.global_batch)
        last = rank == job.ranks - 1
        competitor = Competitor(job.competitor) if job.competitor is not None and last else None
        trainer = pl.Trainer(
            accelerator="cuda",
            devices=1,
            num_nodes=job.ranks,
            strategy=strategy,
            plugins=[OneGpu()],
            callbacks=[Pace(connection, competitor)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            default_root_dir=folder,
        )
        patches = Patches(job.size, _STEPS * job.global_batch)
        batch_size = job.global_batch // job.ranks
        loader = DataLoader(patches, batch_size=batch_size, shuffle=True, collate_fn=_as_it_is)
        trainer.fit(Segmentation(job.filters), loader)
    except (EOFError, BrokenPipeError):
        pass  # the process that compares is gone
    except BaseException:  # noqa: BLE001 - whatever it was, it is shown there
        connection.send(("error", traceback.format_exc()))
    os._exit(0)


def _as_it_is(batch: Any) -> Any:
    return batch


class Side:
    """One side of a comparison, paused until it is asked to train."""

    def __init__(self, job: Job) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gpu_sides"])
        for rank in range(job.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(job, rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def train(self, steps: int, split: Split | None = None, *, profile: bool = False) -> list[dict[str, Any]]:
        """Train some steps; what each rank has to say."""
        for connection in self._connections:
            if split is not None:
                connection.send(("split", split))
            connection.send(("profile" if profile else "train", steps))
        return self._receive()

    def seconds(self, steps: int, split: Split | None = None) -> float:
        """Of a step, over a whole turn."""
        return float(max(answer["seconds"] for answer in self.train(steps, split)) / steps)

    def _receive(self) -> list[Any]:
        answers = []
        for number, connection in enumerate(self._connections):
            try:
                kind, value = connection.recv()
            except EOFError:
                kind, value = "error", "it ended without an error message"
            if kind == "error":
                raise RuntimeError(f"rank {number} failed:\n{value}")
            answers.append(value)
        return answers
