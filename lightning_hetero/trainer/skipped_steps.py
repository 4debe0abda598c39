"""Training steps in which a rank has nothing to train on: `training_step` returned None, or no sample is left.

Such a rank goes backward from a loss of 0, so that DDP averages as in any step; where no rank has anything, all of them
skip the step, as one process does.
"""

import dis
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any, Self

import lightning.pytorch as pl
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_hetero.step.collating import NO_SAMPLES
from lightning_hetero.step.step import Step, StepContext

SKIPPED: Any = object()
"""What the strategy's `training_step` returns if all ranks skip the step; Lightning allows None on one rank only."""


class StepResult(ClosureResult):
    """Lightning's result of a training step, which may be `SKIPPED`."""

    @classmethod
    @override
    def from_training_step_output(cls, training_step_output: STEP_OUTPUT, normalize: int = 1) -> ClosureResult:
        output = None if training_step_output is SKIPPED else training_step_output
        return ClosureResult.from_training_step_output(output, normalize)


def _zero_loss(module: nn.Module) -> Tensor:
    """A loss of 0 whose gradient is 0 for each parameter that trains."""
    terms = [parameter.sum() * 0 for parameter in module.parameters() if parameter.requires_grad]
    loss = terms[0]
    for term in terms[1:]:
        loss = loss + term.to(loss)
    return loss


def may_return_none(module: "pl.LightningModule") -> bool:
    """Whether `training_step`, or a method of the user's that it names, returns None on some paths and not on others.

    It is read from the bytecode, so that ranks need not exchange in each step whether one of them has. What a method of
    another object returns is not seen.
    """
    methods, pending = {"training_step"}, ["training_step"]
    while pending:
        name = pending.pop()
        for owner in type(module).__mro__:  # also those that are called by `super()`
            function = vars(owner).get(name)
            if not isinstance(function, FunctionType) or function.__module__.startswith(("lightning.", "torch")):
                continue
            code = inspect.unwrap(function).__code__
            if _returns_none_sometimes(code):
                return True
            new = {called for called in code.co_names if called not in methods}
            methods |= new
            pending += new
    return False


def _returns_none_sometimes(code: CodeType) -> bool:
    """Whether None and something else may be returned: directly, by a conditional expression, or in a variable."""
    instructions = list(dis.get_instructions(code))
    returns = {one.offset for one in instructions if one.opname == "RETURN_VALUE"}
    found = {one.argval is None for one in instructions if one.opname == "RETURN_CONST"}
    none_in, returned = set(), set()  # names of variables
    for one, after in pairwise(instructions):
        is_none = one.opname == "LOAD_CONST" and one.argval is None
        if after.opname == "RETURN_VALUE":
            found |= {is_none, False} if after.is_jump_target else {is_none}
            returned |= {one.argval} if one.opname == "LOAD_FAST" else set()
        elif is_none and after.opname.startswith("JUMP") and after.argval in returns:
            found.add(True)
        elif is_none and after.opname == "STORE_FAST":
            none_in.add(after.argval)
    return found == {True, False} or bool(none_in & returned)


@dataclass(frozen=True)
class StepsWithNothing:
    """Steps of a fit in which this rank, or another one, may have nothing to train on."""

    module: "pl.LightningModule"
    context: StepContext
    place: str  # rank and device, for messages
    asks: bool  # whether ranks tell each other if `training_step` has returned None

    @classmethod
    def of(cls, module: "pl.LightningModule", context: StepContext, place: str) -> Self:
        """Those of a module; ranks ask each other if its code says that they may have to."""
        several = context.group.world_size > 1 and context.batch_norm_group is None  # whose layers wait for all ranks
        return cls(module, context, place, several and module.automatic_optimization and may_return_none(module))

    @contextmanager
    def handled(self, step: Step, batch: Any, receive: Callable[[], None]) -> Iterator[None]:
        """Inside, the module's `training_step` returns a zero loss if it has no batch or returns None.

        If it does so on all ranks, it returns `SKIPPED`. `receive` waits for the messages of the step.
        """
        if batch is not NO_SAMPLES and not self.asks:
            yield
            return
        if batch is NO_SAMPLES and not (self.module.automatic_optimization and self.context.batch_norm_group is None):
            raise RuntimeError(
                f"the collate function has left nothing of the samples of {self.place} in global batch "
                f"{step.loaded.step}, and there is no other batch in this epoch to compute in its place, which manual "
                "optimization and synchronized BatchNorm need: leave fewer samples out, or choose a larger batch_size"
            )
        attributes = vars(self.module)  # where a compiled module has its own
        before = {name: attributes[name] for name in ("training_step",) if name in attributes}
        own_step = self.module.training_step
        asks = self.asks

        def training_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal asks
            output = None if batch is NO_SAMPLES else own_step(*args, **kwargs)
            if asks:
                asks = False  # once, since only this rank may run its batch in parts, each with such a call
                if self._all_skip(step, receive, skips=output is None):
                    return SKIPPED
            elif self.asks:
                return output
            return _zero_loss(self.module) if output is None else output

        attributes["training_step"] = training_step
        try:
            yield
        finally:
            del attributes["training_step"]
            attributes.update(before)

    def _all_skip(self, step: Step, receive: Callable[[], None], *, skips: bool) -> bool:
        """Whether all ranks with samples skip the step; if only some do, their batches don't count."""
        receive()
        with self.context.timer.waiting():
            call = f"whether training_step of global batch {step.loaded.step} has returned None"
            rows = self.context.group.start([skips], call).wait()  # (W, 1)
        skipped = rows[:, 0] > 0  # (W,)
        if not step.samples[~skipped].any():
            return True
        if skipped.any():
            step.leave_out(skipped)
        return False
