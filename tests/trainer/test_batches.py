"""Batches of any shape, and batches of which nothing is left: what one process trains on the same samples."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_hetero import HeteroStrategy
from lightning_hetero.trainer.skipped_steps import may_return_none
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Recipe, Regression, hetero_fit, make_trainer, plain_fit, relative_error
from tests.trainer.modules import Manual

EXACT = 1e-12


class Listed(Dataset[Any]):
    """Samples in a list; what stands there as None can't be read."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Logged(Regression):
    """Logs its loss in a mean over epochs, with the batch size where Lightning does not find it."""

    def samples(self, batch: Any) -> int | None:
        return None

    def loss(self, batch: Any) -> Any:
        return F.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if loss is not None:
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=self.samples(batch))
        return loss

    def configure_optimizers(self) -> Any:  # Adam would also step with gradients of zeros
        return torch.optim.Adam(self.parameters(), lr=0.05)


# ---- shapes ----


def time_first(samples: list[Any]) -> Any:
    return {key: torch.stack([sample[key] for sample in samples], 1) for key in ("x", "y")}


class Series(Logged):
    def samples(self, batch: Any) -> int | None:
        return batch["x"].shape[1]

    def loss(self, batch: Any) -> Any:
        return F.mse_loss(self.net(batch["x"]), batch["y"])


def series() -> Listed:
    return Listed([{"x": normal(i, 4, 5), "y": normal(100 + i, 4, 1)} for i in range(61)])


class Detector(Logged):
    """Takes a list of images of different sizes with their targets."""

    def samples(self, batch: Any) -> int | None:
        return len(batch)

    def loss(self, batch: Any) -> Any:
        return torch.stack([(self.net(x).mean() - target["boxes"].sum()) ** 2 for x, target in batch]).mean()


def images() -> Listed:
    return Listed([(normal(i, 3, 4 + i % 3, 5), {"boxes": normal(i, i % 4, 4), "id": i}) for i in range(61)])


class Graph:
    """As torch_geometric's: nodes of all graphs together, and to which graph each belongs."""

    def __init__(self, samples: list[Any]) -> None:
        self.x = torch.cat([x for x, _ in samples])
        self.y = torch.stack([y for _, y in samples])
        self.batch = torch.cat([torch.full((len(x),), i) for i, (x, _) in enumerate(samples)])
        self.num_graphs = len(samples)


class Graphs(Logged):
    def samples(self, batch: Any) -> int | None:
        return batch.num_graphs

    def loss(self, batch: Any) -> Any:
        nodes = self.net(batch.x).squeeze(-1)
        sums = torch.zeros(batch.num_graphs, dtype=nodes.dtype).index_add(0, batch.batch, nodes)
        return F.mse_loss(sums, batch.y)


def graphs() -> Listed:
    return Listed([(normal(i, 1 + i % 4, 5), normal(i, ())) for i in range(61)])


# ---- samples that can't be read ----


def unreadable(*indices: int, size: int = 61) -> Any:
    return partial(_unreadable, indices, size)


def _unreadable(indices: tuple[int, ...], size: int) -> Listed:
    samples = Numbers(61)
    return Listed([None if index in indices else samples[index] for index in range(size)])


def flagged(*indices: int) -> Any:
    return partial(_flagged, indices)


def _flagged(indices: tuple[int, ...]) -> Listed:
    samples = Numbers(61)
    return Listed([samples[index] | {"usable": index not in indices} for index in range(61)])


def readable(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample is not None])


def usable(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample["usable"]])


def readable_or_none(samples: list[Any]) -> Any:
    kept = [sample for sample in samples if sample is not None]
    return default_collate(kept) if kept else None


def loader(data: Any, collate: Any, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size, collate_fn=collate, **options)


def fits(recipes: dict[str, Recipe], options: dict[str, Any]) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="`training_step` returned `None`")
    return {name: hetero_fit(recipe, options) for name, recipe in recipes.items()}


def require_parity(recipes: dict[str, Recipe]) -> None:
    """With shares 3:1 all ranks end with the parameters of one process, and its epoch loss."""
    outs = run_ranks(2, fits, recipes, {"shares": [3, 1]})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="train_dataloader yielded None")
        for name, recipe in recipes.items():
            alone = plain_fit(recipe, 12)
            for out in outs:
                assert relative_error(out[name]["parameters"], alone["parameters"]) <= EXACT, name
                assert out[name]["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=EXACT), name


def test_samples_count_and_not_the_length_of_a_tensor() -> None:
    """Series with time first, lists of images, graphs: with weights from a tensor's length, up to 51% off."""
    data = {
        "series": (Series, series, time_first),
        "images": (Detector, images, list),
        "graphs": (Graphs, graphs, Graph),
    }
    recipes = {name: Recipe(module, partial(loader, *rest)) for name, (module, *rest) in data.items()}
    require_parity(recipes)


def test_samples_that_a_collate_function_leaves_out_do_not_count() -> None:
    """Some of a rank's, all of them in its first step or later, and all of all ranks: that step is skipped."""
    second_rank = (9, 10, 11, 33, 34, 35, 45, 46, 47)
    first_rank = (*range(9), *range(12, 21))
    everything = (*range(12), *range(48, 61))
    require_parity(
        {
            "some": Recipe(Logged, partial(loader, unreadable(1, 5, 13, 14), readable)),
            "some, by a flag": Recipe(Logged, partial(loader, flagged(1, 5, 13, 14, 20), usable)),
            "all of a rank's": Recipe(Logged, partial(loader, unreadable(*second_rank), readable)),
            "all of a rank's, by a flag": Recipe(Logged, partial(loader, flagged(*second_rank), usable)),
            "None, by workers": Recipe(
                Logged, partial(loader, unreadable(*first_rank), readable_or_none, num_workers=1)
            ),
            "None on all ranks": Recipe(Logged, partial(loader, unreadable(*everything), readable_or_none)),
            "accumulation": Recipe(
                Logged, partial(loader, unreadable(*second_rank), readable), accumulate_grad_batches=2
            ),
            "manual optimization": Recipe(ManualLogged, partial(loader, unreadable(*second_rank), readable)),
            "nothing else in the epoch": Recipe(Logged, partial(loader, unreadable(*second_rank, size=12), readable)),
        }
    )


class ManualLogged(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("loss", 0.5)


def test_manual_optimization_needs_some_batch() -> None:
    """A rank without any batch in the epoch could not make the backward passes of the others."""
    data = unreadable(9, 10, 11, size=12)
    errors = fails_on_ranks(2, fits, {"": Recipe(Manual, partial(loader, data, readable))}, {"shares": [3, 1]})
    assert "nothing of the samples of rank 1 (cpu) in global batch 0" in errors[1]
    assert "rank 1 (cpu) failed first" in errors[0]


# ---- a training_step that returns None ----


class Skips(Logged):
    """Skips batches with one of some samples, in a method that `training_step` calls."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = set(bad)

    def loss(self, batch: Any) -> Any:
        if self.bad & set(batch["index"].tolist()):
            return None
        return super().loss(batch)


class LeavesOut(Logged):
    """One process that leaves out what ranks skip."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = set(bad)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        kept = [place for place, index in enumerate(batch["index"].tolist()) if index not in self.bad]
        if not kept:
            return None
        loss = self.loss({"x": batch["x"][kept], "y": batch["y"][kept]})
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(kept))
        return loss


SKIPPING = {
    "one rank": ((10, 20), (*range(9, 12), *range(12, 21))),
    "all ranks": ((3, 10, 60), (*range(12), 60)),
}


@pytest.mark.parametrize("on_device", [False, True])
def test_a_rank_whose_training_step_returns_none_counts_nothing(on_device: bool) -> None:
    recipes = {name: Recipe(partial(Skips, *bad)) for name, (bad, _) in SKIPPING.items()}
    outs = run_ranks(2, skipping, recipes, on_device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`training_step` returned `None`")
        for name, (_, left_out) in SKIPPING.items():
            alone = plain_fit(Recipe(partial(LeavesOut, *left_out)), 12)
            for out in outs:
                assert relative_error(out[name]["parameters"], alone["parameters"]) <= EXACT, name
                assert out[name]["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=EXACT), name


def skipping(recipes: dict[str, Recipe], on_device: bool) -> dict[str, Any]:
    from tests.trainer.fits import keep_counts_on_device

    if on_device:
        keep_counts_on_device()
    options = {"shares": [3, 1], "find_unused_parameters": True}
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return fits(recipes, options)


class Always(Logged):
    """Returns a loss on all paths; None in a helper that returns nothing else is no reason to ask."""

    def helper(self) -> None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.helper()
        return self.loss(batch)

    @property
    def loss_scale(self) -> float:
        raise AssertionError("a property is not called")


class Bare(Logged):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            return  # noqa: RET502 - what is tested
        return self.loss(batch)


class Conditional(Logged):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return loss if batch_idx else None


class Reversed(Logged):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx else self.loss(batch)


class Variable(Logged):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = None
        if batch_idx:
            loss = self.loss(batch)
        return loss


class Inherited(Bare):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("module", [Conditional, Reversed, Variable, Inherited])
def test_ways_to_return_none(module: Any) -> None:
    assert may_return_none(module())


@pytest.mark.parametrize(("module", "may"), [(Always, False), (Skips, True), (Bare, True), (Regression, False)])
def test_ranks_ask_each_other_where_the_code_may_return_none(module: Any, may: bool) -> None:
    assert may_return_none(module()) is may


class Stream(IterableDataset[Any]):
    """Each rank's own half of the series; the last batch of a rank is short."""

    def __iter__(self) -> Any:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        yield from series().samples[rank:50:world_size]


class Drawn(Logged):
    """Logs which rank it is, in a mean over samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("rank", float(self.global_rank), on_step=False, on_epoch=True)
        return F.mse_loss(self.net(batch["x"]), batch["y"])


def streamed() -> float:
    from lightning_hetero import HeteroStrategy

    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2)
    trainer.fit(Drawn(), DataLoader(Stream(), batch_size=6, collate_fn=time_first))
    return float(trainer.callback_metrics["rank"])


def test_samples_of_an_iterable_data_set_are_those_that_it_had() -> None:
    """In steps of 9 and 3, rank 0 has 9, 9 and 7 samples; the epoch ends with it."""
    for value in run_ranks(2, streamed):
        assert value == pytest.approx(9 / (25 + 9))


class Sum(Regression):
    """A loss of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(F.mse_loss(self.net(part["x"]).squeeze(-1), part["y"]) for part in batch.values())


def without_the_first(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample["index"] != 0])


def two_loaders() -> None:
    loaders = {
        "a": DataLoader(Numbers(24), batch_size=4, collate_fn=without_the_first),
        "b": DataLoader(Numbers(24), batch_size=4),
    }
    make_trainer(HeteroStrategy(shares=[3, 1]), 2, max_epochs=1).fit(Sum(), loaders)


def test_loaders_that_leave_out_other_numbers_of_samples_are_a_warning() -> None:
    assert "leave out other numbers of samples on rank 0" in fails_on_ranks(2, two_loaders)[0]
