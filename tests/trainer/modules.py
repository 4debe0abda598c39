"""LightningModules that exercise one thing each; all double precision, all deterministic."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

from tests.trainer.fits import Regression


class Classifier(Regression):
    """Cross entropy over `Numbers`' classes; class 0 is ignored where `ignore_index` is 0."""

    def __init__(self, weight: list[float] | None = None, ignore_index: int = -100, *, declares: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.criterion = nn.CrossEntropyLoss(
            weight=torch.tensor(weight, dtype=torch.float64) if weight else None, ignore_index=ignore_index
        )
        if declares:
            self.loss_count = self._loss_count

    def _loss_count(self, batch: Any) -> Any:
        from lightning_hetero import cross_entropy_count

        return cross_entropy_count(self.criterion, batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        loss = self.criterion(self.net(batch["x"]), batch["label"])
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["x"]))
        return {"loss": loss, "extra": 1}


class MaskedMean(Classifier):
    """Its own mean over valid targets: where there is none, even the gradients are NaN; torch's loss gives zeros."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        valid = batch["label"] != self.criterion.ignore_index
        each = F.cross_entropy(self.net(batch["x"]), batch["label"], reduction="none")
        loss = (each * valid).sum() / valid.sum()
        self.log("epoch", loss, on_step=False, on_epoch=True, batch_size=len(batch["x"]))
        self.log("step", loss, on_step=True, on_epoch=False, sync_dist=True, batch_size=len(batch["x"]))
        return loss


class Manual(Regression):
    """Manual optimization with two optimizers on two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(4)
        self.other = nn.Linear(5, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["index"].tolist())
        first, second = self.optimizers()
        loss = F.mse_loss(self.net(batch["x"]).squeeze(-1) + self.other(batch["x"]).squeeze(-1), batch["y"])
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        first.step()
        loss = F.mse_loss(self.net(batch["x"]).squeeze(-1) + self.other(batch["x"]).squeeze(-1), batch["y"])
        second.zero_grad()
        self.manual_backward(loss)
        second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.05), torch.optim.SGD(self.other.parameters(), lr=0.02)]


class Unused(Regression):
    """A branch that is used in even batches only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.branch = nn.Linear(5, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["index"].tolist())
        out = self.net(batch["x"]).squeeze(-1)
        if batch_idx % 2 == 0:
            out = out + self.branch(batch["x"]).squeeze(-1)
        return F.mse_loss(out, batch["y"])


class Newton(Regression):
    """LBFGS: several closures a step, and decisions by the loss."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


class Pairs(Regression):
    """Two loaders at once: the mean over one plus the mean over the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch["a"]["index"].tolist())
        return sum(F.mse_loss(self.net(batch[k]["x"]).squeeze(-1), batch[k]["y"]) for k in ("a", "b"))


class Normalized(Regression):
    """Has BatchNorm, so that statistics and the smallest local batch matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)
        ).double()


class Single(Regression):
    """Single precision."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)


def gradients(module: pl.LightningModule) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in module.parameters()])
