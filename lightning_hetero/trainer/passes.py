"""Forward and backward passes as Lightning makes them, for steps that bypass DDP's wrapper."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_hetero.step.batch_norm import smallest_local_batch
from lightning_hetero.step.out_of_memory import OutOfMemoryRecovery, Passes, find_obstacle


def make_recovery(
    module: "pl.LightningModule", model: nn.Module | None, precision: Precision, *, place: str, custom_hook: bool
) -> OutOfMemoryRecovery:
    """How the steps of a fit recover from running out of memory.

    `model` is the module as the strategy has wrapped it, `place` rank and device for messages; `custom_hook`: the user
    gave DDP a communication hook, or a wrapper for one.
    """
    automatic = module.automatic_optimization
    obstacle = find_obstacle(module, model, automatic_optimization=automatic, custom_hook=custom_hook)
    passes = _passes(module, precision)
    return OutOfMemoryRecovery(module, model, passes, place, smallest_local_batch(module), obstacle)


def _passes(module: "pl.LightningModule", precision: Precision) -> Passes:
    scaler = getattr(precision, "scaler", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with precision.train_step_context():
            return module.training_step(*args, **kwargs)

    def scaled(loss: Tensor) -> Tensor:
        loss = loss / module.trainer.accumulate_grad_batches  # a callback may change it between epochs
        return scaler.scale(loss) if scaler is not None else loss

    @contextmanager
    def without_logging() -> Iterator[None]:
        attributes = vars(module)
        before: dict[str, Any] = {name: attributes[name] for name in ("log", "log_dict") if name in attributes}
        attributes["log"] = attributes["log_dict"] = lambda *_, **__: None
        try:
            yield
        finally:
            del attributes["log"], attributes["log_dict"]
            attributes.update(before)

    return Passes(forward, scaled, lambda loss: precision.backward(loss, module, None), without_logging)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what `training_step` has returned."""
    value = output.get("loss") if isinstance(output, dict) else output
    return value if isinstance(value, Tensor) else None
