"""The side of a comparison that evaluates: a short training, then `Trainer.validate` whenever it is its turn."""

import time
from multiprocessing.connection import Connection
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from tasks import Classifier, Images, Task
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset


class Evaluated(Classifier):
    """Logs the loss of what it evaluates over all ranks, and remembers how many samples those were."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.samples = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.samples += len(images)
        self.log("val_loss", nn.functional.cross_entropy(self.net(images), labels), sync_dist=True)


class Count:
    """Samples of all ranks in an evaluation."""

    def __init__(self, module: Evaluated) -> None:
        self._module = module

    def __call__(self) -> list[int]:
        own = Tensor([self._module.samples])
        everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, own)
        self._module.samples = 0
        return [int(samples) for samples in everywhere]


def evaluate(trainer: pl.Trainer, task: Task, world_size: int, connection: Connection) -> None:
    """Train, then evaluate until the process that compares is gone.

    Args:
        trainer: for one epoch.
        task: what is trained and evaluated.
        world_size: W.
        connection: to the process that compares.
    """
    assert task.evaluation is not None
    data, training = Images(task), range(task.evaluation.steps * task.global_batch)
    batch_size = task.global_batch // world_size
    module = Evaluated(task.model)
    count = Count(module)
    trained = False
    evaluated = DataLoader(Subset(data, range(task.evaluation.samples)), batch_size=batch_size)
    connection.send(("ready", None))
    while True:
        command, argument = connection.recv()
        if command != "train":
            continue
        seconds, cpu = [], time.process_time()
        if not trained:  # not before: ranks are held to their quotas once they are ready
            trainer.fit(module, DataLoader(Subset(data, training), batch_size=batch_size))
            trained = True
        split = [0] * world_size
        for _ in range(argument[0]):
            dist.barrier()
            began = time.perf_counter()
            trainer.validate(module, evaluated, verbose=False)
            dist.barrier()  # it takes as long as its slowest rank
            seconds.append(time.perf_counter() - began)
            split = count()
        answer = {"seconds": seconds, "observed": [], "splits": [tuple(split)] * len(seconds)}
        connection.send(("done", answer | {"cpu": time.process_time() - cpu, "peak": 0}))
