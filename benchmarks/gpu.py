"""What does `hetero` cost on a CUDA GPU, what does it make the host wait for, and what does it gain on unequal shares?

One GPU is enough. First one rank has it for itself, over NCCL: step time beside plain DDP, and how often the host waits
for the device. Then two ranks share it, over gloo (NCCL wants a GPU for each), once as equals and once with other
work queued on the GPU by the second rank's process, all the time: that rank's kernels wait for it, the first one's
do not. The sides take turns in one run, as in the other benchmarks; a turn is timed as a whole, up to where the
device has finished.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Self

import figures
import lightning.pytorch as pl
import reports
import torch
import torch.distributed as dist
from command_line import add_out, parser_of, run, splits_of
from figures import Split, show_split
from lightning.pytorch.callbacks import Callback
from reports import say
from sides import Joined, Observed, change_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

BANDS, CLASSES, STORED, STEPS = 13, 10, 256, 4000
CASES = {"one": (1, False), "two": (2, False), "limited": (2, True)}  # ranks; whether the last one has to compete
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
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
        images = torch.randint(256, (STORED, BANDS, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (STORED, size, size), generator=generator, dtype=torch.uint8)
        self._images, self._labels = images.pin_memory(), labels.pin_memory()

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        first = indices[0] % (STORED - len(indices) + 1)
        chosen = slice(first, first + len(indices))
        return self._images[chosen], self._labels[chosen]


class Segmentation(pl.LightningModule):
    """A fully convolutional network of five layers, the shape of TorchGeo's FCN; little to communicate."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for number in range(5):
            layers += [nn.Conv2d(filters if number else BANDS, filters, 3, padding=1), nn.LeakyReLU(inplace=True)]
        self.net = nn.Sequential(*layers, nn.Conv2d(filters, CLASSES, 1))

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
    """Trains when it is told to, and says how long that took."""

    def __init__(self, connection: Connection, competitor: Competitor | None) -> None:
        self._connection = connection
        self._competitor = competitor
        self._left = 0
        self._began = 0.0
        self._profiler: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        if isinstance(trainer.strategy, Observed):
            answer |= trainer.strategy.told()
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
            strategy = Observed(shares="auto" if job.kind == "hetero" else "equal", global_batch=job.global_batch)
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
        patches = Patches(job.size, STEPS * job.global_batch)
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
    """One side of a comparison, asleep until it is told to train."""

    def __init__(self, job: Job) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark")
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sides"])
        for rank in range(job.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(job, rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._hear()

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
        return self._hear()

    def seconds(self, steps: int, split: Split | None = None) -> float:
        """Of a step, over a whole turn."""
        return float(max(answer["seconds"] for answer in self.train(steps, split)) / steps)

    def _hear(self) -> list[Any]:
        answers = []
        for number, connection in enumerate(self._connections):
            try:
                kind, value = connection.recv()
            except EOFError:
                kind, value = "error", "it ended without a word"
            if kind == "error":
                raise RuntimeError(f"rank {number} failed:\n{value}")
            answers.append(value)
        return answers


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--global-batch", type=int, default=128, help="samples of a step over all ranks")
    add("--size", type=int, default=128, help="pixels of a patch's side")
    add("--filters", type=int, default=64, help="of each convolution")
    add("--rounds", type=int, default=5, help="how often each side has its turn")
    add("--steps", type=int, default=20, help="steps of a turn")
    add("--settle", type=int, default=60, help="steps of hetero before the first round")
    add("--cases", default=",".join(CASES), help="which comparisons are made")
    add("--competitor", type=int, default=1024, help="side of the matrices that the other work multiplies")
    add(
        "--splits",
        type=splits_of,
        default="72/56,80/48,88/40,96/32,104/24",
        help="fixed splits that the limited rank is tried with",
    )
    add_out(parser)
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {min(unknown)!r}; there are {', '.join(CASES)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    return options


def _in_turns(sides: dict[str, tuple[Side, Split | None]], rounds: int, steps: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            side, split = sides[name]
            if split is not None:
                side.train(3, split)  # batches of the old split are on their way
            times[name].append(side.seconds(steps))
    say(", ".join(f"{name} {median(values) * 1000:.2f} ms" for name, values in times.items()))
    return times


def compare(options: argparse.Namespace, ranks: int, *, limited: bool) -> dict[str, Any]:
    """One comparison, all sides in turns."""

    def job(kind: str) -> Job:
        competitor = options.competitor if limited else None
        return Job(kind, ranks, competitor, options.global_batch, options.size, options.filters)

    with ExitStack() as stack:
        ddp, hetero = (stack.enter_context(Side(job(kind))) for kind in ("ddp", "hetero"))
        ddp.train(options.settle // 3)
        hetero.train(options.settle)
        sides: dict[str, tuple[Side, Split | None]] = {"ddp": (ddp, None), "hetero": (hetero, None)}
        tried: list[dict[str, Any]] = []
        if limited:
            fixed = stack.enter_context(Side(job("fixed")))
            fixed.train(options.settle // 3)
            for split in options.splits:
                fixed.train(3, split)
                tried.append({"split": split, "seconds": fixed.seconds(options.steps)})
            best = min(tried, key=lambda entry: entry["seconds"])["split"]
            sides["best"] = (fixed, best)
        times = _in_turns(sides, options.rounds, options.steps)
        result: dict[str, Any] = {
            "ranks": ranks,
            "limited": limited,
            "sides": {name: {"seconds": median(values), "rounds": values} for name, values in times.items()},
            "gain_over_ddp": figures.gain([[t] for t in times["ddp"]], [[t] for t in times["hetero"]]),
            "split": hetero.train(1)[0]["splits"][-1],
        }
        if limited:
            result["gain_over_best"] = figures.gain([[t] for t in times["best"]], [[t] for t in times["hetero"]])
            result |= {"best": best, "fixed_splits": tried}
        last = {name: side.train(options.steps, profile=True) for name, (side, _) in sides.items()}
        for name, answers in last.items():
            result["sides"][name]["peak_bytes"] = [answer["peak"] for answer in answers]
            result["sides"][name]["profiled"] = [
                {"steps": options.steps, "launches": answer["launches"], **answer["waits"]} for answer in answers
            ]
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    keys = ("global_batch", "size", "filters", "rounds", "steps", "settle", "competitor")
    head = reports.head("step time and host waits of hetero on a CUDA GPU, beside plain DDP", options, keys)
    head["hardware"]["gpu"] = torch.cuda.get_device_name()
    cases = []
    for ranks, limited in (CASES[name] for name in options.cases):
        cases.append(compare(options, ranks, limited=limited))
        say(table({"cases": cases[-1:]}))
    return head | {"cases": cases}


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    lines = []
    for case in report["cases"]:
        who = "one rank, NCCL" if case["ranks"] == 1 else "two ranks on one GPU, gloo"
        lines.append(who + (", the second one's GPU shared with other work" if case["limited"] else ""))
        for name, side in case["sides"].items():
            waits = ", ".join(f"{key} {side['profiled'][0][key]}" for key in WAITS)
            peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in side["peak_bytes"])
            lines.append(f"  {name:<8}{side['seconds'] * 1000:>8.2f} ms a step   {peaks} MiB   {waits}")
        for name in ("gain_over_ddp", "gain_over_best"):
            if name in case:
                gain = case[name]
                text = f"{gain['median']:.3f} ({gain['least']:.3f} to {gain['greatest']:.3f})"
                lines.append(f"  hetero, {name.replace('_', ' ')}: {text}, split {show_split(case['split'])}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write, show."""
    options = parse()
    cases = "" if len(options.cases) == len(CASES) else f"-{'-'.join(options.cases)}"
    run(options, f"gpu-fcn-{options.size}px-b{options.global_batch}{cases}", measure, table)


if __name__ == "__main__":
    sys.exit(main())
