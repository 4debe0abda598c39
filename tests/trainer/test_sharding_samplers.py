"""Samplers that shard by rank themselves: torch's is replaced by all that it draws, others are refused."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, make_trainer, merged, parameters_of, relative_error
from tests.trainer.loading import SIZE, OwnSampler, Validating, fit, loader, plain, told_by_lightning

SHUFFLED = {"shuffle": True, "seed": 3}


class Inherits(DistributedSampler[Any]):
    """Draws as torch's own."""

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch + 10)


def grouped(sampler: Any) -> Any:
    class Groups(BatchSampler):
        """A user's own: batches of neighbors."""

    return Groups(sampler, 4, drop_last=False)


def distributed_samplers() -> dict[str, Any]:
    results: dict[str, Any] = {}
    told = told_by_lightning()
    numbers = Numbers(SIZE)

    def sampler(**options: Any) -> DistributedSampler[Any]:
        return DistributedSampler(numbers, **(SHUFFLED | options))

    trainer, module = fit(loader(sampler=sampler()), module=Validating())
    results["shuffled"] = module.seen, parameters_of(module)
    trainer.validate(module, loader(sampler=sampler()), verbose=False)
    results["evaluated"] = list(chain.from_iterable(module.evaluated))
    predicted = trainer.predict(module, loader(sampler=sampler(shuffle=False)), return_predictions=True)
    results["predicted"] = torch.cat(predicted) if predicted else torch.zeros(0)
    results["told"] = [message for message in told.messages if "DistributedSampler" in message]
    results["drop_last"] = fit(loader(sampler=sampler(shuffle=False, drop_last=True)), max_epochs=1)[1].seen
    results["inherits"] = fit(loader(sampler=Inherits(numbers, **SHUFFLED)), max_epochs=1)[1].seen
    results["batches"] = fit(DataLoader(numbers, batch_sampler=grouped(sampler())), max_epochs=1)[1].seen
    results["user shards"] = fit(loader(sampler=sampler()), max_epochs=1, use_distributed_sampler=False)[1].seen
    results["own"] = list(sampler())
    return results


@pytest.fixture(scope="module")
def unsharded() -> list[dict[str, Any]]:
    return run_ranks(2, distributed_samplers)


def whole(epoch: int, **options: Any) -> list[int]:
    """What a DistributedSampler draws that has only one replica."""
    sampler: DistributedSampler[int] = DistributedSampler(Numbers(SIZE), 1, 0, **(SHUFFLED | options))  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


def test_a_distributed_sampler_is_split_by_shares_in_the_order_of_one_replica(unsharded):
    """As in one process, in each of two epochs."""
    own: DistributedSampler[int] = DistributedSampler(Numbers(SIZE), 1, 0, **SHUFFLED)  # type: ignore[arg-type]
    _, module = plain(loader(batch_size=8, sampler=own))
    assert merged(result["shuffled"][0] for result in unsharded) == module.seen
    assert {len(part) for part in unsharded[0]["shuffled"][0][:7]} == {6}
    for result in unsharded:
        assert relative_error(result["shuffled"][1], parameters_of(module)) <= 1e-12


def test_it_evaluates_each_sample_once(unsharded):
    assert sorted(chain.from_iterable(result["evaluated"] for result in unsharded)) == list(range(SIZE))
    predicted = torch.cat([result["predicted"] for result in unsharded])
    assert torch.equal(predicted.sort().values, Numbers(SIZE).y.sort().values)


def test_it_is_said_once_in_a_run(unsharded):
    assert [len(result["told"]) for result in unsharded] == [3, 0], "fit, validate and predict"
    assert "the strategy splits what the DistributedSampler of your loader draws" in unsharded[0]["told"][0]


def test_nothing_is_dropped_for_equal_parts(unsharded):
    assert list(chain.from_iterable(merged(result["drop_last"] for result in unsharded))) == list(range(SIZE))


def test_a_subclass_that_draws_in_the_same_way_keeps_its_epochs(unsharded):
    assert list(chain.from_iterable(merged(result["inherits"] for result in unsharded))) == whole(10)


def test_a_batch_sampler_around_it_draws_from_all_of_it(unsharded):
    assert list(chain.from_iterable(merged(result["batches"] for result in unsharded))) == whole(0)


def test_a_user_who_shards_keeps_it(unsharded):
    for result in unsharded:
        assert list(chain.from_iterable(result["user shards"])) == result["own"]


# ---- samplers of other kinds ----


class Strided(OwnSampler):
    """A user's own: every W-th index of a permutation."""

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[dist.get_rank() :: dist.get_world_size()])

    def __len__(self) -> int:
        return len(list(iter(self)))


class Endless(Strided):
    """Has no length."""

    __len__ = None  # type: ignore[assignment]

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()


class RankSeeded(OwnSampler):
    """Draws all of the data in an order of its rank, which it therefore knows."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.rank)).tolist())


def error_of(data: Any, stage: str = "fit") -> str:
    """The error of a run, "" if there is none."""
    module = Validating()
    try:
        if stage == "fit":
            fit(data, module=module, max_epochs=1)
        else:
            make_trainer(HeteroStrategy(shares=[3, 1]), 2).validate(module, data, verbose=False)
    except ValueError as error:
        return str(error)
    return ""


def errors() -> dict[str, str]:
    numbers = Numbers(600)
    batches = BatchSampler(Strided(600), 4, drop_last=False)
    found = {
        "a user's own": error_of(DataLoader(numbers, 4, sampler=Strided(600))),
        "in validation": error_of(DataLoader(numbers, 4, sampler=Strided(600)), "validate"),
        "few samples": error_of(DataLoader(Numbers(12), 2, sampler=Strided(12))),
        "in a batch sampler": error_of(DataLoader(numbers, batch_sampler=batches)),
        "without a length": error_of(DataLoader(numbers, 4, sampler=Endless(600))),
        "repeated augmentation": error_of(DataLoader(numbers, 4, sampler=RepeatAugSampler(numbers))),
        "in order": error_of(DataLoader(numbers, 4, sampler=OrderedDistributedSampler(numbers)), "validate"),
    }
    one = RepeatAugSampler(numbers, num_replicas=1, rank=0, selected_round=0)
    _, module = fit(DataLoader(numbers, 20, sampler=one), max_epochs=1)
    found["one replica"] = module.seen
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="RankSeeded draws other indices on every rank, so those of rank 0"):
            found["random"] = error_of(loader(sampler=RankSeeded(SIZE)))
    else:
        found["random"] = error_of(loader(sampler=RankSeeded(SIZE)))
    _, module = fit(DataLoader(numbers, 20, sampler=Strided(600)), max_epochs=1, use_distributed_sampler=False)
    found["user shards"] = module.seen
    return found


def test_other_samplers_that_shard_are_refused_with_a_sentence():
    results = run_ranks(2, errors)
    names = {
        "a user's own": "Strided",
        "in validation": "Strided",
        "few samples": "Strided",
        "in a batch sampler": "BatchSampler",
        "without a length": "Endless",
        "repeated augmentation": "RepeatAugSampler",
        "in order": "OrderedDistributedSampler",
        "random": "",
    }
    for result in results:
        for name, sampler in names.items():
            if not sampler:
                assert result[name] == "", name
            elif name == "in a batch sampler":
                assert "draws another part of the data on each rank" in result[name]
            else:
                assert result[name].startswith(f"{sampler} draws another part of the data on each rank"), name
                assert "use_distributed_sampler=False" in result[name]
                assert "num_replicas=1, rank=0" in result[name]
    once = merged(result["one replica"] for result in results)
    drawn = list(chain.from_iterable(once))
    assert len(drawn) == 600
    assert len(set(drawn)) == 200, "each image three times"
    sharded = merged(result["user shards"] for result in results)
    assert sorted(chain.from_iterable(sharded)) == list(range(600))
