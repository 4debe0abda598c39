"""What a user's code exchanges between ranks in the hooks of an evaluation: right on all ranks, or one sentence."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

FOLDER = ""
ERROR = "lightning_hetero.trainer.evaluation_exchanges.UnmatchedExchangeError"

CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "reduce": ("reduce", lambda trainer: float(trainer.strategy.reduce(torch.tensor(2.0 * trainer.global_rank)))),
    "broadcast": ("broadcast", lambda trainer: trainer.strategy.broadcast(("of rank", trainer.global_rank))),
    "all_gather": (
        "all_gather",
        lambda trainer: trainer.strategy.all_gather(torch.tensor(trainer.global_rank)).tolist(),
    ),
    "barrier": ("barrier", lambda trainer: trainer.strategy.barrier()),
    "reduce_boolean_decision": (
        "reduce",
        lambda trainer: trainer.strategy.reduce_boolean_decision(trainer.global_rank == 0, all=False),
    ),
    "save_checkpoint": ("save_checkpoint", lambda trainer: trainer.save_checkpoint(f"{FOLDER}/a.ckpt")),
}
"""By a name: how the sentence names the call, and the call."""

ANSWERS: dict[str, Any] = {
    "reduce": 1.0,
    "broadcast": ("of rank", 0),
    "all_gather": [0, 1],
    "barrier": None,
    "reduce_boolean_decision": True,
    "save_checkpoint": None,
}


class Evaluated(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


class Batches(Callback):
    """Makes a call at the end of this rank's first evaluation batch."""

    def __init__(self, call: str, ranks: tuple[int, ...]) -> None:
        self.call, self.ranks = call, ranks

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank in self.ranks:
            CALLS[self.call][1](trainer)


class Ends(Callback):
    """Makes all calls where all ranks are together."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, Any]] = {}

    def ask(self, hook: str, trainer: Any) -> None:
        self.answers[hook] = {name: call(trainer) for name, (_, call) in CALLS.items()}

    def on_validation_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.ask("on_validation_epoch_start", trainer)

    def on_validation_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.ask("on_validation_epoch_end", trainer)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.ask("on_validation_end", trainer)


def in_folder(folder: str) -> None:
    """In this process, which ends with the test."""
    global FOLDER  # noqa: PLW0603
    FOLDER = folder


def fit_with(callback: Callback, folder: str) -> None:
    in_folder(folder)
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2, max_epochs=1, callbacks=[callback], num_sanity_val_steps=0)
    trainer.fit(Evaluated(), DataLoader(Numbers(24), batch_size=4), DataLoader(Numbers(30), batch_size=4))


def calling(call: str, ranks: tuple[int, ...], folder: str) -> None:
    fit_with(Batches(call, ranks), folder)


@pytest.mark.parametrize("call", CALLS)
def test_an_exchange_at_the_end_of_a_batch_is_one_sentence(tmp_path: Any, call: str) -> None:
    """Ranks have different numbers of batches, so the call would wait for one that may not come."""
    name = CALLS[call][0]
    for rank, text in fails_on_ranks(2, calling, call, (0, 1), str(tmp_path)).items():
        assert text.splitlines()[-1] == (
            f"{ERROR}: rank {rank} (cpu) calls {name} in on_validation_batch_end, but ranks evaluate different "
            "numbers of batches, so the others may never join: exchange at the end, such as in "
            "on_validation_epoch_end, or let self.log do it"
        )
    assert list(tmp_path.iterdir()) == [], "a checkpoint of one rank's doing"


@pytest.mark.parametrize("call", CALLS)
def test_the_rank_that_calls_alone_blames_no_other(tmp_path: Any, call: str) -> None:
    """And the other, which does nothing wrong, ends too and says why."""
    errors = fails_on_ranks(2, calling, call, (1,), str(tmp_path))
    sentence = f"rank 1 (cpu) calls {CALLS[call][0]} in on_validation_batch_end"
    assert errors[1].splitlines()[-1].startswith(f"{ERROR}: {sentence}")
    assert f"rank 1 (cpu) failed first: UnmatchedExchangeError: {sentence}" in errors[0].splitlines()[-1]


def together(folder: str) -> dict[str, dict[str, Any]]:
    callback = Ends()
    fit_with(callback, folder)
    return callback.answers


def test_where_all_ranks_are_together_each_call_is_right(tmp_path: Any) -> None:
    hooks = ("on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end")
    for answers in run_ranks(2, together, str(tmp_path)):
        assert answers == dict.fromkeys(hooks, ANSWERS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


class Stale(Callback):
    """Broadcasts texts: some are rank 0's alone, and the same is broadcast in a batch later."""

    def on_validation_epoch_start(self, trainer: Any, *_: Any) -> None:
        trainer.strategy.broadcast("first" if trainer.global_rank == 0 else "")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1:
            trainer.strategy.broadcast("")


def stale(folder: str) -> None:
    fit_with(Stale(), folder)


def test_what_was_broadcast_before_is_no_answer(tmp_path: Any) -> None:
    """Only `trainer.log_dir` is: another text of rank 0 may be a new one."""
    errors = fails_on_ranks(2, stale, str(tmp_path))
    assert "rank 1 (cpu) calls broadcast in on_validation_batch_end" in errors[1].splitlines()[-1]
