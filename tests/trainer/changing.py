"""Modules whose trainable parameters change during training; all double precision, all deterministic."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.trainer.fits import Regression


class TwoParts(Regression):
    """A backbone and a head; `frozen` says whether the backbone begins frozen."""

    def __init__(self, *, frozen: bool = True, head_only: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
        self.net = nn.Linear(8, 1).double()
        self.backbone.requires_grad_(not frozen)
        self.head_only = head_only

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        return F.mse_loss(self.net(self.backbone(batch["x"])).squeeze(-1), batch["y"])

    def configure_optimizers(self) -> Any:
        parameters = self.net.parameters() if self.head_only else self.parameters()
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)


class ByEpoch(TwoParts):
    """Unfreezes its backbone in the second epoch, and freezes it again in the third."""

    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch == 1)


class ByBatch(TwoParts):
    """Unfreezes its backbone in the middle of an epoch, and of a window of accumulation, and freezes it likewise."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone.requires_grad_(batch_idx in (1, 2, 3))


class FirstLayer(TwoParts):
    """The same, for one of its layers only."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone[0].requires_grad_(batch_idx in (1, 2, 3))


class WithinStep(TwoParts):
    """Decides in `training_step` itself what trains, before it computes anything."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.backbone.requires_grad_(batch_idx in (0, 1, 4))
        return super().training_step(batch, batch_idx)


class WithinManualStep(TwoParts):
    """The same with manual optimization, and only while `training_step` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone.requires_grad_(batch_idx in (0, 1, 4))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.backbone.requires_grad_(False)


class AllWithinStep(TwoParts):
    """Nothing trains before the first call of `training_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.requires_grad_(requires_grad=True)
        return super().training_step(batch, batch_idx)


class FrozenAtFirst(TwoParts):
    """Nothing trains before the first epoch begins."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(requires_grad=False)

    def on_train_epoch_start(self) -> None:
        self.requires_grad_(requires_grad=True)


class Alternating(TwoParts):
    """Trains its backbone and its head in turns."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone.requires_grad_(batch_idx % 2 == 0)
        self.net.requires_grad_(batch_idx % 2 == 1)


class Growing(TwoParts):
    """Gets another layer in the second epoch, with values of each rank's own, and a new head in the third."""

    def __init__(self) -> None:
        super().__init__(frozen=False)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)
        optimizer = self.trainer.optimizers[0]
        if self.current_epoch == 1:
            self.backbone.append(nn.Linear(8, 8).double())
            self.backbone[-1].register_buffer("noise", torch.randn(8, dtype=torch.float64))
            optimizer.add_param_group({"params": self.backbone[-1].parameters()})
        if self.current_epoch == 2:
            self.net = nn.Linear(8, 1).double()
            optimizer.add_param_group({"params": self.net.parameters()})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.backbone(batch["x"])
        if len(self.backbone) > 4:
            hidden = hidden + self.backbone[-1].noise
        return F.mse_loss(self.net(hidden).squeeze(-1), batch["y"])


class Resting(TwoParts):
    """Manual optimization; nothing trains in some steps."""

    def __init__(self) -> None:
        super().__init__(frozen=False)
        self.automatic_optimization = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.requires_grad_(batch_idx % 3 != 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        if loss.requires_grad:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


class Compiled(ByEpoch):
    """With a compiled backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.compile(backend="aot_eager", dynamic=True)


class ByEpochNormalized(ByEpoch):
    """With BatchNorm in the part that is frozen, and one more layer of it from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.insert(1, nn.BatchNorm1d(8).double())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            self.backbone.append(nn.BatchNorm1d(8).double())
            self.trainer.optimizers[0].add_param_group({"params": self.backbone[-1].parameters()})


class Adversarial(TwoParts):
    """Two optimizers, of which `toggled_optimizer` lets one train at a time; counts how often DDP has wrapped it."""

    def __init__(self) -> None:
        super().__init__(frozen=False)
        self.automatic_optimization = False
        self.wrappers: dict[int, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.wrappers[id(self.trainer.strategy.model)] = self.trainer.strategy.model
        for optimizer in self.optimizers():
            with self.toggled_optimizer(optimizer):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.backbone, self.net)]
