"""One rank's part in the demo: a `hetero` run, interleaved with short runs of plain DDP and the fast device alone.

All three run as in a user's script: a Trainer with one argument that differs. They take turns in the same processes, on
the same cores, so that other load on the machine affects all three.
"""

import copy
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.plugins.environments import LightningEnvironment
from numpy.typing import NDArray
from torch.nn.utils import parameters_to_vector
from torchgeo.trainers import SemanticSegmentationTask
from typing_extensions import override

from lightning_hetero.demo.devices import Devices, prepare_process
from lightning_hetero.demo.processes import Request
from lightning_hetero.demo.recipe import Recipe
from lightning_hetero.demo.schedule import Schedule
from lightning_hetero.demo.stopwatch import StepTime, Stopwatch, clock_for
from lightning_hetero.strategy import HeteroStrategy

CHECKPOINT = "landcover.ckpt"
Side = Literal["plain DDP", "hetero", "alone"]


@dataclass(frozen=True)
class Job:
    """What all ranks are to do.

    Args:
        devices: see `devices.choose`.
        recipe: what is trained.
        schedule: which steps are compared, and when the sides take turns.
        out: the folder for the results.
    """

    devices: Devices
    recipe: Recipe
    schedule: Schedule
    out: Path


@dataclass(frozen=True)
class Turn:
    """What one rank did in one turn of a side (plain DDP, hetero, or the fast device alone).

    Args:
        steps: the steps that are compared.
        all_steps: the same, and the steps before them.
        weights: the model's parameters at the end, as one vector.
    """

    steps: list[StepTime]
    all_steps: list[StepTime]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Round:
    """What rank 0 reports after a round of turns.

    Args:
        number: counted from 1.
        local_batches: the plan of `hetero`.
        hetero: the steps of `hetero` in this round.
        ddp: the steps of plain DDP.
    """

    number: int
    local_batches: tuple[int, ...]
    hetero: list[StepTime]
    ddp: list[StepTime]


@dataclass
class Record:
    """What one rank did.

    Args:
        turns: of each side, in order; `hetero` has one.
        local_batches: the plan that `hetero` had at the end.
    """

    turns: dict[Side, list[Turn]] = field(default_factory=dict)
    local_batches: tuple[int, ...] = ()


class Bar(TQDMProgressBar):
    """Lightning's progress bar with the side's name in front; it clears its line for the next side's turn.

    Args:
        side: the side that it shows.
    """

    def __init__(self, side: Side) -> None:
        self._terminal = sys.stdout.isatty()  # a file keeps what a terminal overwrites
        super().__init__(refresh_rate=1 if self._terminal else 10)
        self._side = side

    def clear(self) -> None:
        """Clear the line for another bar or for text."""
        self.train_progress_bar.clear()

    @property
    @override
    def is_enabled(self) -> bool:
        return super().is_enabled and (self._terminal or self._side == "hetero")

    @property
    @override
    def train_description(self) -> str:
        return f"{self._side:<9}"

    @override
    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.leave = self._side == "hetero"
        return bar

    @override
    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)  # over in a second

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description(self.train_description)


def flat_parameters(module: LightningModule) -> NDArray[np.float32]:
    """A copy of all parameters, as one vector."""
    weights: NDArray[np.float32] = parameters_to_vector(module.parameters()).detach().cpu().numpy().copy()
    return weights


def trainer_for(job: Job, side: Side, callbacks: list[Callback], **options: Any) -> Trainer:
    """A Trainer as a user writes it; sides differ in `strategy` and `devices` only."""
    gpus = list(job.devices.gpus)
    world_size = 1 if side == "alone" else job.devices.world_size
    return Trainer(
        strategy={"plain DDP": "ddp", "hetero": "hetero", "alone": "auto"}[side],
        accelerator=job.devices.accelerator,
        devices=gpus[:world_size] or world_size,
        callbacks=[*callbacks, Bar(side)],
        default_root_dir=job.out,
        plugins=[LightningEnvironment()],  # this demo has started the ranks, whatever cluster it runs in
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def take_turn(job: Job, side: Side, start: SemanticSegmentationTask) -> Turn:
    """A short run of a side, from the same weights and the same patches each time."""
    task = copy.deepcopy(start)
    data = job.recipe.data(1 if side == "alone" else job.devices.world_size, job.schedule.max_steps)
    stopwatch = Stopwatch(clock_for(job.devices.accelerator), data.newly_visited)
    steps = job.schedule.warm_up + job.schedule.steps
    trainer = trainer_for(job, side, [stopwatch], max_steps=steps, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    times = stopwatch.steps()
    return Turn(times[job.schedule.warm_up :], times, flat_parameters(task))


class Turns(Callback):
    """Runs the turns of the other sides between steps of the `hetero` run.

    Args:
        job: see `Job`.
        start: the task before training.
        stopwatch: of the `hetero` run.
        record: where the results go.
        request: lets the main process run the turn of the fast device alone, and waits for it.
    """

    def __init__(
        self, job: Job, start: SemanticSegmentationTask, stopwatch: Stopwatch, record: Record, request: Request
    ) -> None:
        self._job = job
        self._start = copy.deepcopy(start)
        self._stopwatch = stopwatch
        self._record = record
        self._request = request
        self._weights = np.empty(0, np.float32)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        schedule = self._job.schedule
        if trainer.global_step == schedule.warm_up + schedule.steps:
            self._weights = flat_parameters(pl_module)  # to be compared with the others' after as many steps
        if not schedule.is_others_turn(trainer.global_step):
            return
        bar = trainer.progress_bar_callback
        assert isinstance(bar, Bar)
        bar.clear()
        turns = self._record.turns.setdefault("plain DDP", [])
        turns.append(take_turn(self._job, "plain DDP", self._start))
        if trainer.is_global_zero:
            newest = self._stopwatch.steps()[1 - schedule.steps :]
            self._request(Round(len(turns), tuple(_local_batches(trainer)), newest, turns[-1].steps))
        trainer.strategy.barrier()  # all wait until the fast device has had its turn
        self._stopwatch.resume()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = self._stopwatch.steps()
        compared = [step for number, step in enumerate(steps) if self._job.schedule.is_compared(number)]
        self._record.turns["hetero"] = [Turn(compared, steps, self._weights)]
        self._record.local_batches = _local_batches(trainer)


def _local_batches(trainer: Trainer) -> tuple[int, ...]:
    assert isinstance(trainer.strategy, HeteroStrategy)
    return tuple(trainer.strategy.plan.local_batches)


def train(job: Job, rank: int, request: Request) -> Record:
    """All that one rank does.

    Args:
        job: see `Job`.
        rank: its number, which Lightning finds in the environment.
        request: see `Turns`.
    """
    silence_lightning()
    seed_everything(job.recipe.seed, verbose=False)
    task = job.recipe.task()
    data = job.recipe.data(job.devices.world_size, job.schedule.max_steps)
    stopwatch = Stopwatch(clock_for(job.devices.accelerator), data.newly_visited)
    record = Record()
    callbacks: list[Callback] = [stopwatch, Turns(job, task, stopwatch, record, request)]
    trainer = trainer_for(job, "hetero", callbacks, max_steps=job.schedule.max_steps)
    prepare_process(job.devices, rank)  # not earlier, or the strategy would warn that two ranks share one core
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(job.out / CHECKPOINT)
    return record


class FastDeviceAlone:
    """The fast device alone, in the main process: it is in no process group, so its runs are those of a single device.

    Args:
        job: see `Job`.
        end_round: called after each round.
    """

    def __init__(self, job: Job, end_round: Callable[[Round, Turn], None]) -> None:
        seed_everything(job.recipe.seed, verbose=False)
        self._job = job
        self._start = job.recipe.task()
        self._end_round = end_round
        self.turns: list[Turn] = []

    def take_turn(self, finished: Round) -> None:
        """Called by request of rank 0, once the other sides have had their turns of a round."""
        prepare_process(self._job.devices, 0)
        self.turns.append(take_turn(self._job, "alone", self._start))
        self._end_round(finished, self.turns[-1])


def silence_lightning() -> None:
    """Silence Lightning's advice, which is for the author of a script."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
