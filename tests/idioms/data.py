"""Idioms of data, with batches of any shape: https://lightning.ai/docs/pytorch/stable/data/data.html."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from tests.idioms.gallery import Alike, PerSample, Run, Topic
from tests.idioms.modules import Linear
from tests.trainer.fits import Numbers, parameters_of

TOPIC = Topic("Data")


class Series(Linear):
    """Over series, time first: (T, B, 5)."""

    def loss(self, batch: Any) -> Any:
        return F.mse_loss(self(batch["series"]).mean(0), batch["y"])


def series(samples: list[Any]) -> Any:
    batch = default_collate(samples)
    return {"series": torch.stack([batch["x"], batch["x"].tanh(), -batch["x"]]), "y": batch["y"]}


@TOPIC.idiom("series with time first, `(T, B, C)`, by a collate function")
def time_first(run: Run) -> Any:
    # Lightning takes the number of times for the batch size: one process weighs a smaller last batch like a full one.
    return run.fit(Series(), run.loader(30, collate_fn=series), run.loader(32, collate_fn=series))


class Detection(Linear):
    """Over lists of (image, target), images of different sizes: (1..3, 5)."""

    def loss(self, batch: Any) -> Any:
        return torch.stack([(self(image).mean() - target["y"]).square() for image, target in batch]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch), sync_dist=True)


def as_pairs(samples: list[Any]) -> Any:
    return [(s["x"].expand(1 + s["index"] % 3, 5), {"y": s["y"]}) for s in samples]


def as_tuple(samples: list[Any]) -> Any:
    return tuple(zip(*as_pairs(samples), strict=True))


@TOPIC.idiom("a list of (image, target), images of different sizes")
def pairs(run: Run) -> Any:
    return run.fit(Detection(), run.loader(30, collate_fn=as_pairs), run.loader(30, collate_fn=as_pairs))


@TOPIC.idiom("a tuple of all images and a tuple of all targets, as torchvision's detectors take them")
def tuples(run: Run) -> Any:
    class Module(Detection):
        def loss(self, batch: Any) -> Any:
            return super().loss(list(zip(*batch, strict=True)))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    return run.fit(Module(), run.loader(30, collate_fn=as_tuple), run.loader(30, collate_fn=as_tuple))


@TOPIC.idiom("graphs: nodes of all samples in one tensor, and the graph that each belongs to")
def graphs(run: Run) -> Any:
    def join(samples: list[Any]) -> Any:
        sizes = torch.tensor([1 + s["index"] % 3 for s in samples])
        nodes = torch.cat([s["x"].expand(1 + s["index"] % 3, 5) for s in samples])
        graph = torch.repeat_interleave(torch.arange(len(samples)), sizes)
        return {"nodes": nodes, "graph": graph, "y": torch.stack([s["y"] for s in samples])}

    class Module(Linear):
        def loss(self, batch: Any) -> Any:
            sums = torch.zeros_like(batch["y"]).index_add(0, batch["graph"], self(batch["nodes"]))
            return F.mse_loss(sums, batch["y"])

    return run.fit(Module(), run.loader(30, collate_fn=join))


class Some(Linear):
    """Over batches that may lack samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def loss_count(self, batch: Any) -> int:
        return len(batch["x"])


@TOPIC.idiom("a collate function that leaves out unreadable samples")
def unreadable(run: Run) -> Any:
    def readable(samples: list[Any]) -> Any:
        return default_collate([s for s in samples if s["index"] % 7 != 1])

    return run.fit(Some(), run.loader(32, collate_fn=readable))


@TOPIC.idiom("a collate function that leaves out all of a rank's samples")
def all_unreadable(run: Run) -> Any:
    def readable(samples: list[Any]) -> Any:
        return default_collate([s for s in samples if not 12 <= s["index"] < 16])

    # Global batches of 8: the second one's last samples, and so all that rank 1 has.
    return run.fit(Some(), run.loader(32, collate_fn=readable))


class Stream(IterableDataset[Any]):
    """All samples in order; not sharded."""

    def __init__(self, size: int = 32) -> None:
        self.data = Numbers(size)

    def __iter__(self) -> Iterator[Any]:
        return (self.data[index] for index in range(len(self.data)))


@TOPIC.idiom("an `IterableDataset` that isn't sharded, in training and validation")
def iterable(run: Run) -> Any:
    return run.fit(Linear(), run.loader(Stream()), run.loader(Stream(30)))


class Batches:
    """Batches in memory, in place of a DataLoader."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.batches = list(DataLoader(Numbers(size), batch_size=batch_size))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@TOPIC.idiom("a loader that is no `DataLoader`: batches in memory, in training and validation")
def batches_in_memory(run: Run) -> Any:
    return run.fit(Linear(), Batches(32, run.batch(4)), Batches(32, run.batch(4)))


class OwnBatches(Sampler[list[int]]):
    """Every third sample first."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.size, self.batch_size = size, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = [index for first in range(3) for index in range(first, self.size, 3)]
        return (order[k : k + self.batch_size] for k in range(0, self.size, self.batch_size))

    def __len__(self) -> int:
        return 1 + (self.size - 1) // self.batch_size


@TOPIC.idiom("a batch sampler of one's own")
def batch_sampler(run: Run) -> Any:
    data = DataLoader(Numbers(30), batch_sampler=OwnBatches(30, run.batch(4)))
    return run.fit(Linear(), data, data)


@TOPIC.idiom("`WeightedRandomSampler` with a generator")
def weighted(run: Run) -> Any:
    sampler = WeightedRandomSampler([1.0, 3.0] * 16, 32, generator=torch.Generator().manual_seed(5))
    return run.fit(Linear(), run.loader(32, sampler=sampler))


@TOPIC.idiom("a `RandomSampler` with a generator, epochs cut short by `limit_train_batches=3`")
def cut_short(run: Run) -> Any:
    data = Numbers(40)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    return run.fit(Linear(), run.loader(data, sampler=sampler), limit_train_batches=3)


@TOPIC.idiom("`shuffle=True`: each sample once in an epoch, the same weights on all ranks")
def shuffled(run: Run) -> Any:
    # Another order than that of one process, which draws it from the generator that all of its code shares.
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.seen = PerSample()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1:
                self.seen.update(dict.fromkeys(batch["index"].tolist(), 1))
            return self.loss(batch)

    module = Module()
    pl.seed_everything(11, verbose=False)
    run.fit(module, run.loader(32, shuffle=True))
    return {"parameters": Alike(parameters_of(module)), "seen": module.seen}


@TOPIC.idiom("a `DistributedSampler` given by hand, `set_epoch` called by Lightning")
def distributed_sampler(run: Run) -> Any:
    # Validation on an odd number of samples: the sampler would repeat one.
    train, val = Numbers(32), Numbers(31)
    replicas = {"num_replicas": run.world_size, "rank": run.rank}
    return run.fit(
        Linear(),
        run.loader(train, sampler=DistributedSampler(train, **replicas, seed=3)),
        run.loader(val, sampler=DistributedSampler(val, **replicas, shuffle=False)),
    )


@TOPIC.idiom(
    "a sampler that yields `indices[rank::world_size]`",
    sentence="use_distributed_sampler=False|one replica",
    reason="a sentence: half of the data would never be trained on; it says what to do",
)
def sharding(run: Run) -> Any:
    class Sharding(Sampler[int]):
        def __init__(self) -> None:
            self.indices = list(range(32))[run.rank :: run.world_size]

        def __iter__(self) -> Iterator[int]:
            return iter(self.indices)

        def __len__(self) -> int:
            return len(self.indices)

    return run.fit(Linear(), run.loader(32, sampler=Sharding()))


class Module(pl.LightningDataModule):
    """Prepares a file on one rank, reads it on all."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.path = run, run.folder / "size.txt"

    def prepare_data(self) -> None:
        self.path.write_text("30")

    def setup(self, stage: str) -> None:
        self.data = Numbers(int(self.path.read_text()))

    def train_dataloader(self) -> Any:
        return self.run.loader(self.data)

    def val_dataloader(self) -> Any:
        return self.run.loader(self.data)


@TOPIC.idiom("a `LightningDataModule` with `prepare_data` and `setup`")
def data_module(run: Run) -> Any:
    return run.fit(Linear(), datamodule=Module(run))


@TOPIC.idiom("loaders of the module itself, `reload_dataloaders_every_n_epochs=1`, a batch size that grows")
def reloaded(run: Run) -> Any:
    class Growing(Linear):
        def train_dataloader(self) -> Any:
            return run.loader(32, 4 * (1 + self.current_epoch))

    trainer, module = run.trainer(reload_dataloaders_every_n_epochs=1), Growing()
    trainer.fit(module)
    return {"parameters": parameters_of(module), "steps": trainer.global_step}


OPTIONS: dict[str, dict[str, Any]] = {
    "`drop_last=True`": {"drop_last": True},
    "`persistent_workers=True`": {"num_workers": 1, "persistent_workers": True},
}


def _options(options: dict[str, Any]) -> Any:
    return lambda run: run.fit(Linear(), run.loader(30, **options))


for name, options in OPTIONS.items():
    TOPIC.idiom(name)(_options(options))


@TOPIC.idiom("`limit_train_batches=0.5`")
def limited(run: Run) -> Any:
    return run.fit(Linear(), run.loader(40), limit_train_batches=0.5)


class Two(Linear):
    """Takes a batch of each of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        both = batch.values() if isinstance(batch, dict) else batch
        return sum(self.loss(each) for each in both if each is not None)


LOADERS: dict[str, Any] = {
    "a dict of two loaders": lambda a, b: {"a": a, "b": b},
    "a list of two loaders": lambda a, b: [a, b],
    "`CombinedLoader` in its mode `min_size`": lambda a, b: CombinedLoader([a, b], "min_size"),
    "`CombinedLoader` in its mode `max_size`, None where a loader has ended": lambda a, b: CombinedLoader(
        [a, b], "max_size"
    ),
    "`CombinedLoader` in its mode `max_size_cycle`": lambda a, b: CombinedLoader({"a": a, "b": b}, "max_size_cycle"),
}


def _loaders(make: Any) -> Any:
    return lambda run: run.fit(Two(), make(run.loader(32), run.loader(16)))


for name, make in LOADERS.items():
    TOPIC.idiom(f"{name} in training")(_loaders(make))


@TOPIC.idiom("fewer samples than ranks in training")
def one_sample(run: Run) -> Any:
    return run.fit(Linear(), run.loader(1), run.loader(1))


@TOPIC.idiom("`on_before_batch_transfer` and `on_after_batch_transfer`: changes of a batch")
def transfer_hooks(run: Run) -> Any:
    class Changing(Linear):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "x": batch["x"] + 1}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "x": batch["x"] / 2}

    return run.fit(Changing(), run.loader(30), run.loader(30))


class Batch:
    """One's own, which only its module knows."""

    def __init__(self, samples: list[Any]) -> None:
        self.content = default_collate(samples)


@TOPIC.idiom("a batch class of one's own with `transfer_batch_to_device`")
def own_batch(run: Run) -> Any:
    class Moving(Linear):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            batch.content = {key: value.to(device) for key, value in batch.content.items()}
            return batch

        def loss(self, batch: Any) -> Any:
            return super().loss(batch.content)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch), batch_size=len(batch.content["x"]), sync_dist=True)

    return run.fit(Moving(), run.loader(30, collate_fn=Batch), run.loader(30, collate_fn=Batch))


@TOPIC.idiom("`use_distributed_sampler=False` with a `DistributedSampler` of one's own")
def own_sharding(run: Run) -> Any:
    data = Numbers(32)
    if run.world_size == 1:
        return run.fit(Linear(), run.loader(data))
    sampler = DistributedSampler(data, shuffle=False)
    return run.fit(Linear(), run.loader(data, sampler=sampler), use_distributed_sampler=False)
