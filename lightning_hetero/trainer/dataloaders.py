"""Takes a Trainer's loaders over: the user's loader stays what it is, only its batch sampler becomes ours.

Lightning injects its own sampler before a strategy is asked, and loaders may be built as early as the user's
`setup`. So the hook that prepares a loader is replaced on the one Trainer that the strategy works for.
"""
# ruff: noqa: SLF001 - what is touched of a Trainer and of its loaders is guarded by tests

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_hetero.exchange.consistency import require
from lightning_hetero.exchange.duplicate_data import DuplicateDataCheck
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.sampling.eval_sampler import EvaluationSampler
from lightning_hetero.sampling.global_batches import Chunks, GlobalBatches, Index, fingerprint
from lightning_hetero.sampling.train_sampler import (
    EpochPasses,
    LocalBatchSampler,
    LocalBatchSizeSampler,
    PendingShares,
    Position,
    Share,
)
from lightning_hetero.trainer.evaluation import Evaluation, scope_of

_USERS = "_lightning_hetero_users_loader"  # where a prepared loader keeps the one that it was made from


@dataclass(frozen=True)
class Context:
    """What loaders need to know of the job.

    Args:
        exchange: between the ranks.
        seed: of all streams, shared by all ranks.
        global_batch: the user's, or None for each loader's `batch_size` x W.
        planner: from the global batch of the first training loader to the planner of the run.
        evaluation: what validation, test and prediction take.
        position: where training stands.
        on_borrow: see `LocalBatchSampler`.
    """

    exchange: RankGroup
    seed: int
    global_batch: int | None
    planner: Callable[[int], SplitPlanner]
    evaluation: Evaluation
    position: Callable[[], Position]
    on_borrow: Callable[[], None]


class Agreement:
    """What ranks do about a draw: compare it, and use rank 0's where it differs."""

    def __init__(self, exchange: RankGroup, name: str) -> None:
        self._exchange = exchange
        self._name = name
        self._warned = False

    def __call__(self, drawn: list[list[Index]], *, complete: bool) -> list[list[Index]]:
        """See `sampler.Agree`."""
        if self._exchange.world_size == 1 or len(set(self._exchange.gather(fingerprint(drawn)))) == 1:
            return drawn
        if not complete:
            raise ValueError(
                f"{self._name} has no length and draws other indices on every rank: give it a length, or let it take "
                "its randomness from torch's, numpy's or Python's global generators"
            )
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self._name} draws other indices on every rank, so those of rank 0 are used on all of them. If it "
                "shards the data by rank itself, set Trainer(use_distributed_sampler=False); else let it take its "
                "randomness from torch's, numpy's or Python's global generators, or give it a generator= with a seed "
                "if it takes one, and runs can be repeated"
            )
        return self._exchange.broadcast(drawn)


def replace_batch_sampler(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A loader like `loader` in everything but its batch sampler; the user's own stays untouched.

    Its batches come in the order in which they were drawn, also with ``in_order=False``: they go by number.
    """
    clone = copy.copy(loader)
    clone.in_order = True
    # DataLoader forbids to set it after construction, and rebuilding one needs arguments that can only be guessed.
    object.__setattr__(clone, "batch_sampler", batch_sampler)
    clone._iterator = None
    vars(clone)[_USERS] = loader
    return clone


def users_loader(loader: object) -> object:
    """The user's loader behind one that was prepared; Lightning puts prepared ones into the user's CombinedLoader."""
    return getattr(loader, _USERS, loader)


class Recorder:
    """A batch sampler that hands on what the user's draws, and remembers a hash of each of the first batches."""

    def __init__(self, batch_sampler: Any) -> None:
        self._batch_sampler = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)
        self.hashes: deque[str] = deque()

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batch_sampler):
            if number < DuplicateDataCheck.WATCHED:
                self.hashes.append(fingerprint([batch]))
            yield batch

    def __len__(self) -> int:
        return len(self._batch_sampler)


class LockstepLoader:
    """An iterable data set's loader that ends on all ranks when it ends on one.

    It holds one batch ahead: whether all ranks have that one is asked for while the batch before is trained on.

    Args:
        loader: this rank's own, with a `LocalBatchSizeSampler`.
        exchange: a group of its own, with one column.
    """

    def __init__(self, loader: DataLoader[Any], exchange: RankGroup) -> None:
        vars(self).update(_loader=loader, _exchange=exchange)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets `worker_init_fn` when workers are to be seeded, and `_iterator` when it has shut them down.
        setattr(self._loader, name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._loader)
        end = object()
        ahead = next(iterator, end)
        ready = self._exchange.start([float(ahead is not end)])
        while ready.wait().all():
            batch, ahead = ahead, next(iterator, end)
            ready = self._exchange.start([float(ahead is not end)])
            yield batch


def _numbers_for_geography(loader: DataLoader[Any]) -> bool:
    """Whether a geographic data set is to be indexed with plain numbers."""
    classes = type(loader.dataset).__mro__
    return (
        any(cls.__name__ == "GeoDataset" and cls.__module__.startswith("torchgeo.") for cls in classes)
        and isinstance(loader.batch_sampler, BatchSampler)
        and isinstance(loader.batch_sampler.sampler, SequentialSampler)
    )


def _require_tiles(sampler: object) -> None:
    """See that a random geographic sampler has tiles to draw from; torch would speak of probabilities instead.

    Raises:
        ValueError: it has none.
    """
    if not type(sampler).__module__.startswith("torchgeo."):
        return
    space = getattr(sampler, "spatial_sampler", sampler)
    areas = getattr(space, "areas", None)  # of tiles that are large enough
    inner = getattr(space, "series", None)  # where centres of patches may lie, from 0.10 on
    if (isinstance(areas, torch.Tensor) and not areas.numel()) or (inner is not None and bool(inner.is_empty.all())):
        height, width = getattr(space, "size", (math.nan, math.nan))
        raise ValueError(
            f"no tile is as large as the patches of {_name(space)}, {height:g} × {width:g} in units of the data "
            "set's CRS: choose a smaller patch_size"
        )


def _distributed(loader: DataLoader[Any]) -> bool:
    """Whether the user's own sampler gives each rank its part."""
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def _name(thing: object) -> str:
    return type(thing).__name__


class Loaders:
    """Prepares the loaders of one Trainer.

    Args:
        trainer: whose.
        context: the job.
    """

    def __init__(self, trainer: "pl.Trainer", context: Context) -> None:
        self._trainer = trainer
        self._context = context
        self._lightnings = trainer._data_connector._prepare_dataloader
        self._round: object = None
        self._in_round = 0
        self._lockstep: dict[int, RankGroup] = {}  # of iterable data sets, by the loader's position
        self._warned_inexact = False

    @property
    def user_shards(self) -> bool:
        """Whether the user said `use_distributed_sampler=False`."""
        return not self._trainer._accelerator_connector.use_distributed_sampler

    def prepare(self, dataloader: object, shuffle: bool, mode: RunningStage) -> object:
        """What Lightning calls for every loader, on all ranks alike."""
        dataloader = users_loader(dataloader)
        if not isinstance(dataloader, DataLoader):
            return dataloader
        overfits: float = vars(self._trainer)["overfit_batches"]  # Lightning sets it without declaring it
        if overfits and _numbers_for_geography(dataloader):
            raise ValueError(
                "overfit_batches replaces the geographic sampler by plain numbers, which "
                f"{_name(dataloader.dataset)} can't be indexed with: use limit_train_batches instead"
            )
        if self.user_shards or _distributed(dataloader):
            return self._left_alone(dataloader, mode)
        if mode == RunningStage.TRAINING:
            return self._training(dataloader)
        if isinstance(dataloader.dataset, IterableDataset):
            return self._lightnings(dataloader, shuffle, mode)
        return self._evaluation(dataloader, mode)

    def _left_alone(self, loader: DataLoader[Any], mode: RunningStage) -> object:
        """The user shards: what his batch sampler draws is looked at, and nothing else."""
        if loader.batch_sampler is None:
            return loader
        if mode == RunningStage.PREDICTING:
            return replace_batch_sampler(loader, _IndexBatchSamplerWrapper(cast(Any, loader.batch_sampler)))
        if mode == RunningStage.TRAINING and self.user_shards:
            return replace_batch_sampler(loader, Recorder(loader.batch_sampler))
        return loader

    @property
    def first_in_round(self) -> bool:
        """Whether the training loader that is being prepared is the first, or the only one."""
        return self._in_round == 0

    # ---- training ----

    def _training(self, loader: DataLoader[Any]) -> object:
        number = self._number_in_round()
        if loader.batch_sampler is None:
            raise ValueError(
                f"the training loader of {_name(loader.dataset)} has batch_size=None and no batch sampler, so its "
                "samples can't be split over the ranks: give it a batch_size or a batch_sampler, or shard the data "
                "yourself with Trainer(use_distributed_sampler=False)"
            )
        global_batch = self._global_batch(loader)
        self._require_agreement(loader, "the training data", global_batch)
        if isinstance(loader.dataset, IterableDataset):
            return self._iterable(loader, global_batch, number)
        stream = self._stream(loader, global_batch, number)
        stream.draw(self._context.position().epoch, 0)
        if stream.first_batch == 0:
            raise ValueError(
                f"the training loader has no batches: {_name(stream.source)} drew too few samples for a global "
                f"batch of {global_batch or 'at least one sample'}{' with drop_last' if loader.drop_last else ''}: let "
                "it draw more (TorchGeo's samplers have a length=), or choose a smaller batch_size"
            )
        planner = self._context.planner(global_batch or stream.first_batch)
        sampler = LocalBatchSampler(
            EpochPasses(stream, self._context.position),
            planner.schedule,
            self._context.exchange.rank,
            minimum=planner.minimum,
            # With workers a share is handed out steps ahead: putting back that random state would undo those steps'.
            on_borrow=self._context.on_borrow if loader.num_workers == 0 else lambda: None,
        )
        return replace_batch_sampler(loader, sampler)

    def _iterable(self, loader: DataLoader[Any], global_batch: int | None, number: int) -> object:
        exchange = self._context.exchange
        assert global_batch is not None, "torch gives an iterable data set its own batch sampler, with a batch size"
        planner = self._context.planner(global_batch)
        counts = LocalBatchSizeSampler(
            planner.schedule,
            exchange.rank,
            global_batch=global_batch,
            minimum=planner.minimum,
            position=self._context.position,
        )
        clone = replace_batch_sampler(loader, counts)
        if number not in self._lockstep:  # a group takes sockets and threads, and lives as long as the process
            self._lockstep[number] = RankGroup(exchange.rank, exchange.world_size, exchange.timeout)
        return LockstepLoader(clone, self._lockstep[number])

    def _number_in_round(self) -> int:
        """How-manieth loader of this training this is; Lightning prepares all of them in one go."""
        key = (id(self._trainer.fit_loop._combined_loader), self._context.position())
        self._in_round = self._in_round + 1 if key == self._round else 0
        self._round = key
        return self._in_round

    def _global_batch(self, loader: DataLoader[Any]) -> int | None:
        """Samples of a step; None where only the batch sampler's draws will tell."""
        own = _batch_size(loader)
        given = self._context.global_batch
        if given is None:
            return own * self._context.exchange.world_size if own is not None else None
        if own is None:
            raise ValueError(
                f"global_batch={given} can't be made up of the batches of {_name(loader.batch_sampler)}, which doesn't "
                "say how many samples it draws as one: give it an attribute batch_size"
            )
        if not _plain_batches(loader) and given % own:
            raise ValueError(
                f"global_batch={given} is not a multiple of the {own} samples that {_name(loader.batch_sampler)} draws "
                "as one batch"
            )
        return given

    def _stream(self, loader: DataLoader[Any], global_batch: int | None, number: int) -> GlobalBatches:
        if _plain_batches(loader):
            plain = loader.batch_sampler
            assert isinstance(plain, BatchSampler)
            assert global_batch is not None
            source: Any = plain.sampler
            chunks = Chunks(global_batch, drop_last=plain.drop_last)
        else:
            source, own = loader.batch_sampler, _batch_size(loader)
            units = global_batch // own if global_batch and own else self._context.exchange.world_size
            chunks = Chunks(units, batched=True)
        _require_tiles(source)
        return GlobalBatches(
            source, chunks, self._context.seed + number, Agreement(self._context.exchange, _name(source))
        )

    def _batches(self, loader: DataLoader[Any], *, all_of_them: bool) -> GlobalBatches:
        """The loader's own batches, as one process draws them."""
        source: Any = loader.batch_sampler
        chunks = Chunks(1, batched=True, whole=True)
        if _plain_batches(loader):
            chunks = Chunks(source.batch_size, drop_last=source.drop_last and not all_of_them, whole=True)
            source = source.sampler
        _require_tiles(source)
        return GlobalBatches(source, chunks, self._context.seed, Agreement(self._context.exchange, _name(source)))

    def _require_agreement(self, loader: DataLoader[Any], topic: str, global_batch: int | None = None) -> None:
        iterable = isinstance(loader.dataset, IterableDataset)
        facts = {
            "data set": _name(loader.dataset),
            "length of the data set": None if iterable else _length(loader.dataset),
            "batch size": loader.batch_size,
            "batch sampler": _name(loader.batch_sampler),
            "global batch": global_batch,
        }
        require(self._context.exchange, facts, topic)

    # ---- evaluation ----

    def _evaluation(self, loader: DataLoader[Any], mode: RunningStage) -> object:
        if loader.batch_sampler is None:
            return self._lightnings(loader, False, mode)
        self._require_agreement(loader, f"the {mode.dataloader_prefix} data")
        evaluation = self._context.evaluation
        sampler = EvaluationSampler(
            # Lightning predicts a last batch that is not full too, whatever the loader says.
            self._batches(loader, all_of_them=mode == RunningStage.PREDICTING),
            self._context.exchange.rank,
            scope=partial(scope_of, self._trainer, mode),
            seconds=partial(evaluation.seconds, mode),
            epoch=lambda: self._context.position().epoch,
            on_begin=partial(evaluation.begin, mode),
        )
        return replace_batch_sampler(
            loader, _IndexBatchSamplerWrapper(sampler) if mode == RunningStage.PREDICTING else sampler
        )

    # ---- while training ----

    def _samplers(self) -> list[Any]:
        combined = self._trainer.fit_loop._combined_loader
        loaders = combined.flattened if combined is not None else []
        return [getattr(loader, "batch_sampler", None) for loader in loaders]

    def _handed_out(self) -> list[PendingShares]:
        return [s.pending_shares for s in self._samplers() if isinstance(s, LocalBatchSampler | LocalBatchSizeSampler)]

    def take(self, step: int) -> list[Share]:
        """This rank's share of global batch `step` in every loader that is split; see `LocalBatchSampler.take`."""
        shares = [
            pending_shares.take(step) for pending_shares in self._handed_out() if not pending_shares.exhausted(step)
        ]
        if len(shares) > 1 and not self._warned_inexact and not _proportional(shares):
            self._warned_inexact = True
            rank_zero_warn(
                "several training loaders whose batches can't be split in the same proportion: one weight serves for "
                "all of them, so the gradient is only nearly that of the global batch. Choose batch sizes that are "
                "multiples of each other."
            )
        return shares

    def drawn(self) -> int:
        """The last step that any loader has handed out; -1 for none."""
        return max((pending_shares.drawn for pending_shares in self._handed_out()), default=-1)

    def index_hash(self) -> str | None:
        """A hash of the indices of the next of the first batches, where the user shards."""
        hashes = [
            sampler.hashes.popleft() for sampler in self._samplers() if isinstance(sampler, Recorder) and sampler.hashes
        ]
        return "".join(hashes) or None


def _proportional(shares: list[Share]) -> bool:
    first = shares[0].counts
    return all(
        a * sum(first) == b * sum(share.counts) for share in shares for a, b in zip(share.counts, first, strict=True)
    )


def _plain_batches(loader: DataLoader[Any]) -> bool:
    """Whether batches are just the sampler's next `batch_size` indices, as torch makes them."""
    return type(loader.batch_sampler) is BatchSampler


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Samples of one of the loader's own batches, where its batch sampler says so."""
    size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _length(dataset: object) -> int | None:
    try:
        return len(dataset)  # type: ignore[arg-type] # whatever has no length is none of our business
    except (TypeError, NotImplementedError):
        return None
