"""Idioms of finetuning: https://lightning.ai/docs/pytorch/stable/advanced/finetuning.html."""

from typing import Any

import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn

from tests.idioms.gallery import Run, Topic
from tests.idioms.modules import Linear
from tests.trainer.fits import parameters_of

TOPIC = Topic("Finetuning")


class Backbone(Linear):
    """A head on a backbone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.backbone = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()

    def forward(self, x: Any) -> Any:
        return self.layer(self.backbone(x)).squeeze(-1)

    def train_backbone(self, yes: bool) -> None:
        for parameter in self.backbone.parameters():
            parameter.requires_grad = yes


@TOPIC.idiom("`BackboneFinetuning(unfreeze_backbone_at_epoch=1)`")
def backbone_finetuning(run: Run) -> Any:
    class Module(Backbone):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)

    return run.fit(Module(), run.loader(30), callbacks=[BackboneFinetuning(1, lambda epoch: 1.5)], max_epochs=3)


@TOPIC.idiom("a `BaseFinetuning` of one's own, layer by layer")
def base_finetuning(run: Run) -> Any:
    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone[0], optimizer, lr=0.02)

    class Module(Backbone):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)

    return run.fit(Module(), run.loader(30), callbacks=[Finetuning()], max_epochs=3)


def _unfreezing(hook: str) -> Any:
    class Module(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.train_backbone(False)

    def unfreeze(self: Any, *_: Any) -> None:
        self.train_backbone(self.global_step >= 4)

    def function(run: Run) -> Any:
        return run.fit(type("Unfreezing", (Module,), {hook: unfreeze})(), run.loader(30))

    return function


for hook in ("on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end"):
    TOPIC.idiom(f"a module that sets `requires_grad` of its backbone in `{hook}`")(_unfreezing(hook))


@TOPIC.idiom("parameters that stop training after an epoch")
def freezing(run: Run) -> Any:
    class Module(Backbone):
        def on_train_epoch_start(self) -> None:
            self.train_backbone(self.current_epoch == 0)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("frozen, trained, and frozen again")
def back_and_forth(run: Run) -> Any:
    class Module(Backbone):
        def on_train_epoch_start(self) -> None:
            self.train_backbone(self.current_epoch == 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return run.fit(Module(), run.loader(30), max_epochs=3)


@TOPIC.idiom("layers added in `on_train_epoch_start`, with `optimizer.add_param_group`")
def added_layers(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.added = nn.ModuleList()

        def forward(self, x: Any) -> Any:
            return super().forward(x) + sum(layer(x).squeeze(-1) for layer in self.added)

        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)
            self.added.append(nn.Linear(5, 1).double())
            self.optimizers().optimizer.add_param_group({"params": list(self.added[-1].parameters())})

    return run.fit(Module(), run.loader(30), max_epochs=3)


@TOPIC.idiom("a head that is replaced in `on_train_epoch_start`, with a new optimizer")
def replaced_head(run: Run) -> Any:
    class Module(Backbone):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                torch.manual_seed(9)
                self.layer = nn.Linear(5, 1).double()
                self.trainer.strategy.setup_optimizers(self.trainer)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("frozen BatchNorm, in evaluation mode while the rest trains")
def frozen_norm(run: Run) -> Any:
    class Module(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.append(nn.BatchNorm1d(5).double())
            self.backbone[-1].running_mean += 0.5
            self.backbone[-1].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.backbone[-1].eval()

    module = Module()
    values = run.fit(module, run.loader(30))
    return {**values, "mean": module.backbone[-1].running_mean}


@TOPIC.idiom("a frozen backbone under `torch.no_grad()`, only the head in the optimizer")
def feature_extractor(run: Run) -> Any:
    class Module(Backbone):
        def forward(self, x: Any) -> Any:
            self.backbone.eval()
            with torch.no_grad():
                features = self.backbone(x)
            return self.layer(features).squeeze(-1)

        def configure_optimizers(self) -> Any:
            self.train_backbone(False)
            return torch.optim.Adam(self.layer.parameters(), lr=0.05)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("a low-rank adapter beside frozen weights")
def adapter(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.layer.requires_grad_(False)
            self.down, self.up = nn.Linear(5, 2, bias=False).double(), nn.Linear(2, 1, bias=False).double()

        def forward(self, x: Any) -> Any:
            return super().forward(x) + self.up(self.down(x)).squeeze(-1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("learning rates by parts of the model")
def parameter_groups(run: Run) -> Any:
    class Module(Backbone):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.backbone.parameters(), "lr": 0.01},
                {"params": self.layer.parameters(), "weight_decay": 0.1},
            ]
            return torch.optim.AdamW(groups, lr=0.05)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("layers made in `configure_model`, and pretrained weights loaded there")
def configured(run: Run) -> Any:
    class Module(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.extra: Any = None

        def configure_model(self) -> None:
            if self.extra is None:
                self.extra = nn.Linear(5, 1).double()
                self.extra.load_state_dict(self.layer.state_dict())

        def forward(self, x: Any) -> Any:
            return super().forward(x) + self.extra(x).squeeze(-1)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("weights shared by two layers")
def tied(run: Run) -> Any:
    class Module(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(5, 5).double()
            self.second.weight = self.backbone[0].weight

        def forward(self, x: Any) -> Any:
            return self.layer(self.second(self.backbone(x))).squeeze(-1)

    return run.fit(Module(), run.loader(30))


@TOPIC.idiom("a second `fit` of another module that has the first one's backbone")
def two_stages(run: Run) -> Any:
    first = Backbone()
    run.fit(first, run.loader(30))
    second = Backbone()
    second.backbone.load_state_dict(first.backbone.state_dict())
    second.train_backbone(False)
    run.fit(second, run.loader(30))
    return {"parameters": parameters_of(second)}
