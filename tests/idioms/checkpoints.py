"""Idioms of checkpoints: https://lightning.ai/docs/pytorch/stable/common/checkpointing.html."""

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.idioms.gallery import Run, Topic
from tests.idioms.modules import Linear
from tests.trainer.fits import parameters_of

TOPIC = Topic("Checkpoints")


@TOPIC.idiom("resuming at an epoch's end with `ckpt_path`")
def resume(run: Run) -> Any:
    trainer = run.trainer()
    trainer.fit(Linear(), run.loader(30))
    trainer.save_checkpoint(run.folder / "saved.ckpt")
    return run.fit(Linear(), run.loader(30), ckpt_path=run.folder / "saved.ckpt", max_epochs=4)


def _resume(which: str) -> Any:
    def function(run: Run) -> Any:
        checkpoint = ModelCheckpoint(run.folder, monitor="val_loss", save_last=True)
        trainer = run.trainer(callbacks=[checkpoint], enable_checkpointing=True)
        trainer.fit(Linear(), run.loader(30), run.loader(22))
        found = trainer.validate(Linear(), run.loader(30), ckpt_path=which, verbose=False)[0]
        trainer.test(ckpt_path=which, dataloaders=run.loader(26), verbose=False)
        return {**found, "test_loss": float(trainer.callback_metrics["test_loss"])}

    return function


for which in ("best", "last"):
    TOPIC.idiom(f"`validate` and `test` with `ckpt_path='{which}'`")(_resume(which))


@TOPIC.idiom("`fit(ckpt_path='last')` of a second Trainer")
def fit_last(run: Run) -> Any:
    for epochs in (1, 3):
        checkpoint = ModelCheckpoint(run.folder / "saved", save_last=True)
        module = Linear()
        values = run.fit(
            module,
            run.loader(30),
            ckpt_path="last" if epochs == 3 else None,
            callbacks=[checkpoint],
            enable_checkpointing=True,
            max_epochs=epochs,
        )
    return values


@TOPIC.idiom("`on_save_checkpoint` and `on_load_checkpoint` of the module")
def own_state(run: Run) -> Any:
    class Module(Linear):
        batches = 0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.batches += 1

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["batches"] = self.batches

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.batches = checkpoint["batches"]

    trainer = run.trainer()
    trainer.fit(Module(), run.loader(30))
    trainer.save_checkpoint(run.folder / "saved.ckpt")
    module = Module()
    values = run.fit(module, run.loader(30), ckpt_path=run.folder / "saved.ckpt", max_epochs=3)
    return {**values, "batches": module.batches}


@TOPIC.idiom("`trainer.save_checkpoint` on all ranks, in `on_train_epoch_end`")
def save_on_all(run: Run) -> Any:
    class Module(Linear):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(run.folder / f"{self.current_epoch}.ckpt")

    values = run.fit(Module(), run.loader(30))
    saved = torch.load(run.folder / "0.ckpt", weights_only=False)
    return {**values, "saved": torch.cat([value.flatten() for value in saved["state_dict"].values()])}


@TOPIC.idiom(
    "`trainer.save_checkpoint` under `if trainer.is_global_zero`",
    sentence=r"rank 0 .*alone in save_checkpoint",
    reason="a sentence: saving waits for all ranks, so all of them have to call it (under plain DDP, too)",
)
def save_on_one(run: Run) -> Any:
    class Module(Linear):
        def on_train_epoch_end(self) -> None:
            if self.trainer.is_global_zero:
                self.trainer.save_checkpoint(run.folder / "saved.ckpt")

    return run.fit(Module(), run.loader(30))


def _alone(call: str) -> Any:
    def function(run: Run) -> Any:
        class Module(Linear):
            def on_train_epoch_end(self) -> None:
                if self.trainer.is_global_zero:
                    strategy = self.trainer.strategy
                    getattr(strategy, call)(*([] if call == "barrier" else [torch.ones(())]))

        return run.fit(Module(), run.loader(30))

    return function


for call in ("reduce", "all_gather", "barrier", "broadcast"):
    TOPIC.idiom(
        f"`strategy.{call}` under `if trainer.is_global_zero`",
        sentence=rf"rank 0 .*alone in {call}",
        reason="a sentence: it needs all ranks (under plain DDP, too)",
    )(_alone(call))


@TOPIC.idiom("`torch.save` of weights under `if trainer.is_global_zero`, then a barrier")
def torch_save(run: Run) -> Any:
    class Module(Linear):
        def on_train_end(self) -> None:
            if self.trainer.is_global_zero:
                torch.save(self.state_dict(), run.folder / "weights.pt")
            self.trainer.strategy.barrier()
            self.loaded = torch.load(run.folder / "weights.pt")

    module = Module()
    run.fit(module, run.loader(30))
    return {"saved": torch.cat([value.flatten() for value in module.loaded.values()])}


@TOPIC.idiom("`load_from_checkpoint` with hyperparameters")
def load_from_checkpoint(run: Run) -> Any:
    trainer = run.trainer()
    trainer.fit(WithHyperparameters(lr=0.02), run.loader(30))
    trainer.save_checkpoint(run.folder / "saved.ckpt")
    module = WithHyperparameters.load_from_checkpoint(run.folder / "saved.ckpt")
    return {"parameters": parameters_of(module), "lr": module.hparams.lr}


class WithHyperparameters(Linear):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@TOPIC.idiom("`ModelCheckpoint(save_weights_only=True)`, loaded by `validate`")
def weights_only(run: Run) -> Any:
    checkpoint = ModelCheckpoint(run.folder / "saved", save_weights_only=True)
    run.fit(Linear(), run.loader(30), callbacks=[checkpoint], enable_checkpointing=True)
    trainer = run.trainer()
    return trainer.validate(Linear(), run.loader(30), ckpt_path=checkpoint.best_model_path, verbose=False)[0]


@TOPIC.idiom("weights of a checkpoint that another run has saved, `strict=False`")
def other_run(run: Run) -> Any:
    class Larger(Linear):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.more = torch.nn.Linear(5, 1).double()

        def forward(self, x: Any) -> Any:
            return super().forward(x) + self.more(x).squeeze(-1)

    trainer = run.trainer()
    trainer.fit(Linear(), run.loader(30))
    trainer.save_checkpoint(run.folder / "saved.ckpt")
    module = Larger()
    state = torch.load(run.folder / "saved.ckpt", weights_only=False)["state_dict"]
    module.load_state_dict(state, strict=False)
    return run.fit(module, run.loader(30))
