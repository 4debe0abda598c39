"""A call that one rank makes alone: one sentence on all ranks, at once or within moments, and never a hang."""

import re
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_hetero import HeteroStrategy
from lightning_hetero.exchange.waits import Waits
from lightning_hetero.trainer import job
from tests.ranks import fails_on_ranks, run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer

CALLS: dict[str, Callable[[Any], Any]] = {
    "reduce": lambda trainer: trainer.strategy.reduce(torch.tensor(2.0)),
    "broadcast": lambda trainer: trainer.strategy.broadcast("text"),
    "all_gather": lambda trainer: trainer.lightning_module.all_gather(torch.ones(2)),
    "barrier": lambda trainer: trainer.strategy.barrier(),
    "save_checkpoint": lambda trainer: trainer.save_checkpoint(f"{trainer.default_root_dir}/a.ckpt"),
}


class Calls(Callback):
    """One rank makes a call at the end of the second batch."""

    def __init__(self, call: str, rank: int) -> None:
        self.call, self.rank = call, rank

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            CALLS[self.call](trainer)


class Normalized(Regression):
    """With buffers that are merged for a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, torch.nn.BatchNorm1d(8, dtype=torch.float64))


def fit(module: Any, *callbacks: Callback, timeout: float = 60, **options: Any) -> None:
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    # In this process, which ends with the test: waits are looked into soon.
    job.Waits = partial(Waits, long=0.3, interval=0.1)
    world_size = torch.distributed.get_world_size()
    strategy = HeteroStrategy(shares=[3, 1, 1][:world_size], global_batch=8, timeout=timedelta(seconds=timeout))
    trainer = make_trainer(strategy, world_size, max_epochs=1, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(Numbers(24), batch_size=4))


def alone(call: str, rank: int) -> None:
    fit(Normalized() if call == "save_checkpoint" else Regression(), Calls(call, rank))


@pytest.mark.parametrize(("call", "rank"), [(call, 0) for call in CALLS] + [("all_gather", 1), ("save_checkpoint", 1)])
def test_the_call_and_its_rank_are_named_on_all_ranks(call: str, rank: int) -> None:
    for text in fails_on_ranks(2, alone, call, rank).values():
        assert text.splitlines()[-1] == (
            "lightning_hetero.exchange.calls.UnmatchedCallError: the ranks went different ways: "
            f"rank {rank} (cpu) is alone in {call} in on_train_batch_end, while rank {1 - rank} (cpu) is in "
            "the training step of global batch 2: no rank can go on. All ranks have to make this call, in the same "
            "order: don't make it under a condition that differs between them, such as `if trainer.is_global_zero`."
        )


class InStep(Regression):
    """One rank gathers in its training step; the other waits for it in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 0 and batch_idx == 1:
            self.all_gather(torch.ones(2))
        return super().training_step(batch, batch_idx)


class Skips(Regression):
    """In manual optimization, one rank skips a backward pass."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.automatic_optimization, self.batch = False, batch

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        if self.global_rank == 0 or batch_idx != self.batch:
            self.manual_backward(loss)


class Early(Regression):
    """One rank gathers before training, while the other begins to train."""

    def on_train_epoch_start(self) -> None:
        if self.global_rank == 0:
            self.all_gather(torch.ones(2))


SKIPPED = "rank 1 (cpu) skipped a backward pass that the others made. Make all ranks run the same backward passes."
USERS = "All ranks have to make this call, in the same order"

STUCK: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "a gathering in a training step": (
        InStep,
        {},
        ["rank 0 (cpu) is alone in all_gather in training_step", "in the backward pass of global batch 1", USERS],
    ),
    "a skipped backward pass": (
        partial(Skips, 1),
        {"log_every_n_steps": 50},
        ["rank 0 (cpu) is in the backward pass of global batch 1", "in the training step of global batch 2", SKIPPED],
    ),
    "a skipped backward pass in a step that is logged": (
        partial(Skips, 0),
        {"log_every_n_steps": 1},
        ["rank 0 (cpu) is in the backward pass of global batch 0", "rank 1 (cpu) is in ", SKIPPED],
    ),
    "a skipped backward pass in the last step": (
        partial(Skips, 2),
        {"log_every_n_steps": 50},
        ["rank 0 (cpu) is in the backward pass of global batch 2", "rank 1 (cpu) is in ", SKIPPED],
    ),
    "a gathering before the first step": (
        Early,
        {},
        ["rank 0 (cpu) is alone in all_gather in on_train_epoch_start", USERS],
    ),
}


def stuck(name: str) -> None:
    module, options, _ = STUCK[name]
    fit(module(), logger="log_every_n_steps" in options, **options)


@pytest.mark.parametrize("name", STUCK)
def test_ranks_that_wait_for_each_other_end(name: str) -> None:
    """Also where a rank is blocked in a backward pass, and can't say anything itself."""
    for text in fails_on_ranks(2, stuck, name).values():
        said = text.splitlines()[-1]
        assert [part for part in STUCK[name][2] if part not in said] == [], said


def together() -> dict[str, Any]:
    """Equal shapes, with and without gradients; then unequal shapes, other types, and other numbers of dimensions."""
    found: dict[str, Any] = {}

    class Gathers(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            rank = self.global_rank
            weight = torch.full((2,), float(rank + 1), requires_grad=True)
            gathered = self.all_gather(weight, sync_grads=True)  # (W, 2)
            (gathered.sum() * (rank + 1)).backward()
            found["gathered"], found["gradient"] = gathered.tolist(), weight.grad.tolist()
            for name, own in {
                "shapes": torch.ones(1 + 2 * rank, 3),
                "types": torch.ones(2, dtype=(torch.float32, torch.float64)[rank]),
                "dimensions": torch.ones((2,) * (1 + rank)),
            }.items():
                for call in (self.all_gather, self.trainer.strategy.reduce):
                    with pytest.raises(ValueError, match="needs tensors of equal") as caught:
                        call(own)
                    found[f"{name} {call.__name__}"] = str(caught.value)
            return super().training_step(batch, batch_idx)

    fit(Gathers())
    return found


def test_tensors_of_equal_shapes_are_gathered_and_others_named() -> None:
    first, second = run_ranks(2, together)
    assert first["gathered"] == [[1.0, 1.0], [2.0, 2.0]]
    assert first["gradient"] == [3.0, 3.0]
    assert first["shapes all_gather"] == second["shapes all_gather"]
    assert first["shapes all_gather"] == (
        "all_gather in training_step needs tensors of equal shapes on all ranks, but gets (1, 3) on rank 0 (cpu) and "
        "(3, 3) on rank 1 (cpu). Ranks have batches of different sizes: keep values in a torchmetrics object with a "
        "list state, or gather them with torch.distributed.all_gather_object or gather_object, which take any size"
    )
    assert "reduce in training_step needs tensors of equal shapes" in first["shapes reduce"]
    assert "gets torch.float32 on rank 0 (cpu) and another on rank 1 (cpu)" in first["types all_gather"]
    assert "gets (2,) on rank 0 (cpu) and (2, 2) on rank 1 (cpu)" in first["dimensions reduce"]


class Stalls(Callback):
    """Rank 2 does not come until rank 0 and rank 1 have given up."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 2 and trainer.global_step == 1:
            store = torch.distributed.distributed_c10d._get_default_store()
            store.wait(["given up 0", "given up 1"], timedelta(seconds=50))

    def on_exception(self, trainer: Any, *_: Any) -> None:
        torch.distributed.distributed_c10d._get_default_store().set(f"given up {trainer.global_rank}", "")


def stalled() -> None:
    fit(Regression(), Stalls(), timeout=3)


def test_a_timeout_names_the_rank_that_is_waited_for() -> None:
    """Not those that wait as well; and the late rank hears it."""
    errors = fails_on_ranks(3, stalled)
    said = "has waited for 3 s in the training step of global batch 1 for rank 2 (cpu) ("
    for rank in (0, 1):
        assert said in errors[rank].splitlines()[-1], errors[rank]
        assert "killed" not in errors[rank].splitlines()[-1]
    assert said in errors[2].splitlines()[-1], errors[2]


# ---- where the other rank has come to its end ----


class AtTheEnd(Callback):
    """Rank 0 makes a call in which the others don't join, since they are done."""

    def on_test_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            trainer.strategy.barrier()

    def on_fit_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            trainer.strategy.all_gather(torch.zeros(1))


class InSetup(Callback):
    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.is_global_zero:
            trainer.strategy.barrier()


class WithTest(Regression):
    def test_step(self, batch: Any, batch_idx: int) -> None: ...


def alone_at_the_end(where: str, folder: str) -> None:
    data = DataLoader(Numbers(12), batch_size=4)
    callbacks = {"test": [AtTheEnd()], "fit": [AtTheEnd()], "setup": [InSetup()]}.get(where, [])
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2, max_epochs=1, callbacks=callbacks)
    if where in ("test", "setup"):
        trainer.test(WithTest(), data, verbose=False)
        return
    trainer.fit(WithTest(), data)
    if where == "afterwards" and trainer.is_global_zero:
        trainer.save_checkpoint(f"{folder}/a.ckpt")


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("test", r"rank 0 \(cpu\) is alone in barrier in on_test_end, while rank 1 \(cpu\) is in the end of the run"),
        ("fit", r"rank 0 \(cpu\) is alone in all_gather in on_fit_end, while rank 1 \(cpu\) is in the end of the run"),
        ("afterwards", r"rank 0 \(cpu\) is alone in save_checkpoint, while rank 1 \(cpu\) is in the end of the run"),
        ("setup", r"rank 0 \(cpu\) is alone in barrier in setup, while rank 1 \(cpu\) is in barrier\('post_setup'\)"),
    ],
)
def test_a_call_that_the_others_do_not_make_any_more(tmp_path: Any, where: str, sentence: str) -> None:
    error = fails_on_ranks(2, alone_at_the_end, where, str(tmp_path))[0].splitlines()[-1]
    assert re.search(sentence, error), error
