"""Idioms of optimization, automatic and manual: https://lightning.ai/docs/pytorch/stable/common/optimization.html."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.idioms.gallery import Run, Topic
from tests.idioms.modules import Classifier, Linear

TOPIC = Topic("Optimization")

OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "`accumulate_grad_batches=3`": ({"accumulate_grad_batches": 3}, 1e-10),
    "`gradient_clip_val`, by norm": ({"gradient_clip_val": 0.5}, 1e-10),
    "`gradient_clip_val`, by value": ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 1e-10),
    "`precision='64-true'`": ({"precision": "64-true"}, 1e-10),
    "`precision='bf16-mixed'`": ({"precision": "bf16-mixed"}, 2e-2),
    "`detect_anomaly=True`": ({"detect_anomaly": True}, 1e-10),
}


def _options(options: dict[str, Any]) -> Any:
    return lambda run: run.fit(Linear(), run.loader(30), **options)


for name, (options, tolerance) in OPTIONS.items():
    TOPIC.idiom(name, tolerance=tolerance)(_options(options))


class Manual(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Adversarial(Manual):
    """Two networks, two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.critic = nn.Linear(1, 1).double()

    def judged(self, values: Any, target: float) -> Any:
        logits = self.critic(values[:, None]).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    def configure_optimizers(self) -> Any:
        make = torch.optim.SGD
        return [make(self.layer.parameters(), lr=0.05), make(self.critic.parameters(), lr=0.02)], []


@TOPIC.idiom("manual optimization, two adversarial networks with `toggle_optimizer`, `find_unused_parameters`")
def adversarial(run: Run) -> Any:
    class Module(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            generator, critic = self.optimizers()
            self.toggle_optimizer(generator)
            loss = self.judged(self(batch["x"]), 1.0)
            self.log("generator_loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
            self.manual_backward(loss)
            generator.step()
            generator.zero_grad()
            self.untoggle_optimizer(generator)
            self.toggle_optimizer(critic)
            loss = (self.judged(batch["y"], 1.0) + self.judged(self(batch["x"]).detach(), 0.0)) / 2
            self.log("critic_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            self.manual_backward(loss)
            critic.step()
            critic.zero_grad()
            self.untoggle_optimizer(critic)

    return run.fit(Module(), run.loader(30), find_unused_parameters=True)


@TOPIC.idiom("manual optimization, an optimizer that steps in every second batch")
def frequencies(run: Run) -> Any:
    class Module(Adversarial):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            loss = self.judged(self(batch["x"]), 1.0) + self.loss(batch)
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            if batch_idx % 2:
                second.step()

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("manual optimization, accumulation by hand over two batches")
def manual_accumulation(run: Run) -> Any:
    class Module(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch) / 2)
            if (batch_idx + 1) % 2 == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("manual optimization, `clip_gradients` and schedulers stepped by hand")
def manual_scheduler(run: Run) -> Any:
    class Module(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()

        def on_train_epoch_end(self) -> None:
            self.log("lr", self.optimizers().param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)]

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("manual optimization, several steps in parts of one sequence, as truncated backpropagation")
def truncated(run: Run) -> Any:
    class Module(Manual):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.cell = nn.RNNCell(1, 3).double()
            self.head = nn.Linear(3, 1).double()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer, hidden = self.optimizers(), None
            for part in batch["x"].split(2, dim=1):  # (B, 2)
                for column in part.unbind(1):
                    hidden = self.cell(column[:, None], hidden)
                optimizer.zero_grad()
                self.manual_backward(F.mse_loss(self.head(hidden).squeeze(-1), batch["y"]) + 0 * self.loss(batch))
                optimizer.step()
                hidden = hidden.detach()

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("sharpness-aware minimization, two backward passes a step")
def sharpness_aware(run: Run) -> Any:
    class Module(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = self.loss(batch)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.manual_backward(loss)
            with torch.no_grad():
                moves = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in self.parameters()]
                for parameter, move in zip(self.parameters(), moves, strict=True):
                    parameter.add_(move)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            with torch.no_grad():
                for parameter, move in zip(self.parameters(), moves, strict=True):
                    parameter.sub_(move)
            optimizer.step()
            optimizer.zero_grad()

    return run.fit(Module(), run.loader(30))


def _scheduled(make: Any, **config: Any) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

        def on_train_end(self) -> None:
            self.lr = self.optimizers().param_groups[0]["lr"]

    def function(run: Run) -> Any:
        module = Module()
        values = run.fit(module, run.loader(30), run.loader(22), max_epochs=3)
        return {**values, "lr": module.lr}

    return function


def _plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)


TOPIC.idiom("a scheduler by epoch")(_scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)))
TOPIC.idiom("a scheduler by step, `trainer.estimated_stepping_batches`")(
    _scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12), interval="step", frequency=1)
)
TOPIC.idiom("`ReduceLROnPlateau` on the validation loss, by epoch")(_scheduled(_plateau, monitor="val_loss"))
TOPIC.idiom("`ReduceLROnPlateau` on the training loss, by step")(
    _scheduled(_plateau, monitor="loss", interval="step", frequency=1)
)


@TOPIC.idiom("`trainer.estimated_stepping_batches` in `configure_optimizers`")
def estimated(run: Run) -> Any:
    class Module(Linear):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("`torch.optim.LBFGS`, the epoch's loss logged")
def second_order(run: Run) -> Any:
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("`optimizer_step` overridden: warm-up of the learning rate")
def warm_up(run: Run) -> Any:
    class Module(Linear):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 5)
            optimizer.step(closure=optimizer_closure)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("`optimizer_step` overridden: the optimizer steps in every second batch, the closure always runs")
def step_now_and_then(run: Run) -> Any:
    class Module(Linear):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("`configure_gradient_clipping` and `optimizer_zero_grad` overridden")
def overridden(run: Run) -> Any:
    class Module(Linear):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.5 / (1 + self.current_epoch))

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("gradients changed in `on_after_backward`: noise-free rescaling, NaN replaced")
def changed_gradients(run: Run) -> Any:
    class Module(Linear):
        def on_after_backward(self) -> None:
            for parameter in self.parameters():
                parameter.grad = torch.nan_to_num(parameter.grad) * 0.5

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("gradient checkpointing")
def recomputed(run: Run) -> Any:
    class Module(Linear):
        def forward(self, x: Any) -> Any:
            return checkpoint(self.layer, x, use_reentrant=False).squeeze(-1)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("a dict with `loss` and more from `training_step`, used in `on_train_batch_end`")
def loss_dict(run: Run) -> Any:
    class Module(Linear):
        def on_train_epoch_start(self) -> None:
            self.total = torch.zeros((), dtype=torch.float64)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            errors = (self(batch["x"]) - batch["y"]).square()
            return {"loss": errors.mean(), "errors": errors.detach()}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.total += outputs["errors"].sum()

        def on_train_epoch_end(self) -> None:
            self.log("total", self.total, reduce_fx="sum", sync_dist=True)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom(
    "a contrastive loss that gathers embeddings with `self.all_gather(..., sync_grads=True)` in `training_step`",
    sentence=r"all_gather.*gather_object",
    reason="a sentence: local batches have different sizes, so embeddings can't be stacked",
)
def contrastive(run: Run) -> Any:
    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            embeddings = self.all_gather(self(batch["x"]), sync_grads=True).reshape(-1, 4)
            return F.cross_entropy(embeddings @ embeddings.T, torch.arange(len(embeddings)))

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("a loss divided by the number of samples of all ranks, reduced by hand: `sum * world_size / n`")
def globally_divided(run: Run) -> Any:
    class Module(Linear):
        def loss_count(self, batch: Any) -> int:
            return 1  # the loss is divided by the same number on all ranks

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            n = self.trainer.strategy.reduce(torch.tensor(float(len(batch["x"]))), reduce_op="sum")
            return (self(batch["x"]) - batch["y"]).square().sum() * self.trainer.world_size / n

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("an ignored class, with `loss_count` declared")
def ignored(run: Run) -> Any:
    class Module(Classifier):
        def loss(self, batch: Any) -> Any:
            return F.cross_entropy(self(batch["x"]), batch["label"], ignore_index=0)

        def loss_count(self, batch: Any) -> Any:
            return (batch["label"] != 0).sum()

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("`training_step` returns None for a bad batch, one of a single rank: it counts nothing")
def skipped(run: Run) -> Any:
    # In the third global batch, samples 16 to 23, all but the first five are bad, and with them all that rank 1 has:
    # one process leaves out the bad ones.
    class Module(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            good = (batch["index"] < 21) | (batch["index"] > 23)
            if not good.any():
                return None
            return F.mse_loss(self(batch["x"])[good], batch["y"][good])

        def loss_count(self, batch: Any) -> Any:
            return ((batch["index"] < 21) | (batch["index"] > 23)).sum()

    return run.fit(Module(), run.loader(32))


@TOPIC.idiom("a counter in a buffer that anneals the loss, the last global batch smaller than the world")
def annealed(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("it", torch.zeros((), dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.it += 1
            return self.loss(batch) / (1 + self.it / 4)

    module = Module()
    return {**run.fit(module, run.loader(25, 12), max_epochs=3), "it": module.it}


@TOPIC.idiom("`spectral_norm`, the last global batch smaller than the world")
def spectral(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.layer = nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)), nn.Linear(3, 1)
            ).double()

    return run.fit(Module(), run.loader(25, 12), max_epochs=3)


@TOPIC.idiom("no optimizer: `configure_optimizers` returns None")
def no_optimizer(run: Run) -> Any:
    class Module(Linear):
        def configure_optimizers(self) -> Any:
            return None

    return run.fit(Module(), run.loader(30), run.loader(30))
