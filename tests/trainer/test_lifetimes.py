"""What a strategy offers before, during and after the runs of its Trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

NO_PLAN = "there is no plan: it is made with the training loader, and stays in the process that trains"
NO_RUN = "the strategy belongs to a running Trainer: call fit, validate, test or predict"
NO_FIT = "training_step, backward and optimizer_step of the strategy belong to Trainer.fit"


def said(ask: Callable[[], Any]) -> Any:
    """The answer, or the sentence of the error."""
    try:
        return ask()
    except RuntimeError as error:
        return str(error)


class Asks(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Any] = {}

    def _ask(self, hook: str) -> None:
        strategy = self.trainer.strategy
        plan = said(lambda: strategy.plan)
        self.answers[hook] = (
            getattr(plan, "local_batches", plan),
            said(lambda: strategy.run.trainer is self.trainer),
            said(lambda: strategy.fit is not None),
        )

    def setup(self, stage: str) -> None:
        self._ask("setup")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._ask("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self._ask("on_train_end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._ask("validation_step")


def asked(split: bool) -> dict[str, Any]:
    module, strategy = Asks(), HeteroStrategy(shares=[3, 1])
    trainer = make_trainer(strategy, 2, max_epochs=1, use_distributed_sampler=split)
    module.trainer = trainer
    module._ask("before")
    trainer.validate(module, DataLoader(Numbers(8), batch_size=4), verbose=False)
    module.answers["only evaluated"] = module.answers.pop("validation_step")
    data = Numbers(24) if split else Subset(Numbers(24), range(dist.get_rank(), 24, 2))
    trainer.fit(module, DataLoader(data, batch_size=4))
    module.trainer = trainer
    module._ask("after")
    return module.answers


@pytest.mark.parametrize("split", [True, False], ids=["the strategy splits", "the user shards"])
def test_what_is_there_when(split: bool) -> None:
    """A plan from the training loader on, the run while the Trainer runs, the fit while it trains."""
    plan = (6, 2) if split else NO_PLAN
    expected = {
        "before": (NO_PLAN, NO_RUN, NO_FIT),
        "setup": (NO_PLAN, True, NO_FIT),
        "only evaluated": (NO_PLAN, True, NO_FIT),
        "training_step": (plan, True, True),
        "on_train_end": (plan, True, True),
        "after": (plan, NO_RUN, NO_FIT),
    }
    for answers in run_ranks(2, asked, split):
        assert answers == expected
