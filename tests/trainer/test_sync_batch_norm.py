"""`Trainer(sync_batchnorm=True)` on unequal ranks trains as one process does."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_hetero.step.sync_batch_norm import SynchronizedBatchNorm
from tests.ranks import run_ranks
from tests.trainer.fits import (
    Numbers,
    Recipe,
    Regression,
    hetero_fit,
    keep_counts_on_device,
    parameters_of,
    plain_fit,
    relative_error,
)
from tests.trainer.modules import MaskedMean

EXACT = 1e-12


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8, momentum=None),
        nn.Tanh(),
        nn.Linear(8, width),
    ).double()


class Normal(Regression):
    """Two BatchNorm layers; what callers see of parameters holds the statistics too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = network(1)

    def parameters_and_statistics(self) -> torch.Tensor:
        return torch.cat([parameters_of(self), *[b.double().flatten() for b in self.buffers()]])

    def on_fit_end(self) -> None:
        self.seen = [[self.parameters_and_statistics().tolist()]]


class NormalMasked(MaskedMean):
    """Targets ignored; where nothing is left on a rank its gradients are NaN."""

    def __init__(self) -> None:
        super().__init__(ignore_index=1)
        torch.manual_seed(3)
        self.net = network(4)

    on_fit_end = Normal.on_fit_end
    parameters_and_statistics = Normal.parameters_and_statistics


class NormalIgnored(NormalMasked):
    """Targets ignored, in torch's way: the gradients of an empty rank are zeros."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch["x"]), batch["label"], ignore_index=1)


class Averaged(Normal):
    """Stochastic weight averaging, which goes through the data once more for BatchNorm's statistics."""

    def configure_callbacks(self) -> Any:
        return [StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)]


def sized(size: int, batch_size: int) -> DataLoader[Any]:
    return DataLoader(Numbers(size), batch_size=batch_size)


RECIPES = {
    "short last batch": Recipe(module=Normal, loader=partial(sized, 46), batch_size=4),
    "accumulation": Recipe(module=Normal, loader=partial(sized, 46), batch_size=4, accumulate_grad_batches=2),
    "weights averaged": Recipe(module=Averaged, loader=partial(sized, 46), batch_size=4, max_epochs=3),
    "shares of one sample": Recipe(module=Normal, loader=partial(sized, 24), batch_size=2),
    "ignored targets": Recipe(module=NormalIgnored, loader=partial(sized, 24), batch_size=2),
    "empty ranks whose gradients are NaN": Recipe(module=NormalMasked, loader=partial(sized, 24), batch_size=2),
}


def fit_all(on_device: bool) -> list[Any]:
    if on_device:
        keep_counts_on_device()
    outs = []
    for recipe in RECIPES.values():
        recipe.trainer["sync_batchnorm"] = True
        outs.append(hetero_fit(recipe, {"shares": [3, 1]})["seen"])
    return outs


def check(on_device: bool) -> None:
    ranks = run_ranks(2, fit_all, on_device)
    for number, (name, recipe) in enumerate(RECIPES.items()):
        plain = plain_fit(recipe, 2 * recipe.batch_size)["seen"]
        for rank, outs in enumerate(ranks):
            error = relative_error(*(torch.tensor(v[0][0], dtype=torch.float64) for v in (outs[number], plain)))
            assert error <= EXACT, f"{name}: rank {rank} is off by {error:.1e}"


def test_ends_as_in_one_process() -> None:
    """Parameters and running statistics; short last batches, borrowed steps, accumulation, one sample, empty ranks."""
    check(on_device=False)


def test_counts_that_only_the_device_knows() -> None:
    """The same where the host never learns the counts."""
    check(on_device=True)


class Kinds(Callback):
    def __init__(self) -> None:
        self.kinds: list[Any] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.kinds.append([type(layer) for layer in module.net])


def kinds() -> Any:
    from lightning_hetero import HeteroStrategy
    from tests.trainer.fits import make_trainer

    module, seen = Normal(), Kinds()
    trainer = make_trainer(HeteroStrategy(), 2, max_epochs=1, sync_batchnorm=True, callbacks=[seen])
    trainer.fit(module, sized(24, 4))
    return [kind is SynchronizedBatchNorm for kind in seen.kinds[0]], [type(layer) for layer in module.net]


def test_layers_are_ours_while_training_only() -> None:
    """In place of torch's, which refuse the CPU; afterwards the module has its own layers again."""
    for during, after in run_ranks(2, kinds):
        assert during == [False, True, False, False, True, False, False]
        assert after == [type(layer) for layer in network(1)]
