"""Whether a run can survive that a rank runs out of memory, and what is said where it can't."""

from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import _augment_message
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.step.batch_norm import smallest_local_batch
from lightning_hetero.step.out_of_memory import Passes, Recovery, explained, impossible
from lightning_hetero.step.step import TrainingSteps


class Survival:
    """What a rank does about running out of memory.

    Args:
        module: the LightningModule.
        model: what the strategy has made of it.
        precision: the Trainer's plugin.
        steps: this rank's.
        place: rank and device, for messages.
        hooked: the user gave DDP a communication hook, or a wrapper for one.
    """

    def __init__(
        self,
        module: "pl.LightningModule",
        model: nn.Module | None,
        precision: Precision,
        steps: TrainingSteps,
        *,
        place: str,
        hooked: bool,
    ) -> None:
        self._module = module
        self._precision = precision
        self._steps = steps
        self._place = place
        automatic = module.automatic_optimization
        self._impossible = impossible(module, model, automatic=automatic, hooked=hooked)
        self._recovery: Recovery | None = None
        if self._impossible is None and isinstance(model, DistributedDataParallel):
            smallest = smallest_local_batch(module)
            self._recovery = Recovery(module, model, steps, self._passes(), place=place, smallest=smallest)

    def _passes(self) -> Passes:
        module, precision = self._module, self._precision

        def compute(*args: Any, **kwargs: Any) -> Any:
            with precision.train_step_context():
                return module.training_step(*args, **kwargs)

        scaler = getattr(precision, "scaler", None)
        return Passes(
            forward=compute,
            backward=lambda loss: precision.backward(loss, module, None),
            scaled=scaler.scale if scaler is not None else lambda loss: loss,
            accumulated=lambda: module.trainer.accumulate_grad_batches,
        )

    @property
    def recovery(self) -> Recovery | None:
        """What survives it in this step; None where that is not to be expected, or can't be."""
        return self._recovery if self._recovery is not None and self._steps.risky and self._recovery.ready else None

    def explained(self) -> AbstractContextManager[None]:
        """An out-of-memory error inside says where it happened, why it ends the run, and what to do."""
        if self._steps.local_batch is None:
            reason = "where the user shards a step can't be repeated in parts"
        elif self._steps.risky:
            reason = self._impossible or "with static_graph the first step can't be repeated in parts"
        else:
            reason = self._impossible or "it has computed as many samples in an earlier step"
        return explained(self._place, self._steps.local_batch, reason)

    def backward(self, recovery: Recovery, loss: Tensor, unweighted: Tensor, *, average: bool) -> Tensor:
        """A backward pass past DDP's wrapper, as the precision in use wants it.

        Args:
            recovery: see `recovery`.
            loss: to go backward from.
            unweighted: the user's.
            average: whether gradients are averaged over the ranks afterwards.
        """
        scaled = self._precision.pre_backward(loss, self._module)
        recovery.backward(scaled, loss, unweighted, average=average)
        return self._precision.post_backward(scaled, self._module)


def name_unused(exception: BaseException) -> None:
    """Where DDP misses the gradients of unused parameters, say what to do in terms of this strategy."""
    _augment_message(
        exception,
        pattern=".*Expected to have finished reduction in the prior iteration.*",
        new_message=(
            "Your LightningModule has parameters that were not used in producing the loss returned by"
            " training_step. If this is intentional, use strategy='hetero_find_unused_parameters_true' or"
            " HeteroStrategy(find_unused_parameters=True)."
        ),
    )
