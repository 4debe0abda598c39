"""The strategy as a user meets it: names, plans learned and written down, signals, and a Trainer left as it was."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

import lightning_hetero
from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Numbers, Regression, make_trainer, parameters_of, relative_error


def test_public_names() -> None:
    """A new public name or knob is a decision: it has to be written here as well."""
    assert sorted(lightning_hetero.__all__) == ["HeteroStrategy", "Plan", "cross_entropy_count"]
    parameters = inspect.signature(HeteroStrategy).parameters.values()
    assert [(p.name, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD] == [
        ("shares", "auto"),
        ("global_batch", None),
        ("loss_count", None),
        ("memory_limit", 0.9),
        ("granularity", 1),
        ("gradient_as_bucket_view", True),
    ]


@pytest.mark.parametrize(
    ("name", "options", "start_method"),
    [
        ("hetero", {}, "popen"),
        ("hetero_find_unused_parameters_true", {"find_unused_parameters": True}, "popen"),
        ("hetero_spawn", {}, "spawn"),
    ],
)
def test_registered_names(name: str, options: dict[str, Any], start_method: str) -> None:
    """What `Trainer(strategy=...)` understands once the package is imported."""
    strategy = StrategyRegistry.get(name)
    assert isinstance(strategy, HeteroStrategy)
    assert strategy._ddp_kwargs == options | {"gradient_as_bucket_view": True}
    assert strategy._start_method == start_method


class Uneven(Regression):
    """Rank 1 does the same work ten times over."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(10 if self.global_rank == 1 else 1):
            for sample in batch["x"]:
                torch.linalg.matrix_exp(sample.outer(sample).repeat(8, 8) / 100)
        return super().training_step(batch, batch_idx)


def learn(folder: str) -> Any:
    module, strategy = Uneven(), HeteroStrategy(global_batch=32)
    trainer = make_trainer(strategy, 2, max_epochs=1, logger=CSVLogger(folder, name="run"))
    trainer.fit(module, DataLoader(Numbers(32 * 25), batch_size=16))
    return strategy.plan.local_batches, [len(seen) for seen in module.seen], trainer.log_dir


def test_shares_are_learned_and_written_down(tmp_path: Path) -> None:
    """A rank that is ten times as slow gets less within a few steps; every plan is a line of plan.jsonl."""
    (plan, sizes0, folder), (plan1, sizes1, _) = run_ranks(2, learn, str(tmp_path))
    assert plan == plan1
    assert plan[0] > 2 * plan[1]
    events = [json.loads(line) for line in (Path(folder) / "hetero" / "plan.jsonl").read_text().splitlines()]
    lines = [event for event in events if event["event"] == "plan"]
    first = lines[0]
    assert (first["step"], sum(first["local_batches"]), first["predicted_seconds"]) == (0, 32, [])
    # Other work on the machine may have slowed one rank's probe down.
    assert (first["reason"] == "equal") == (first["local_batches"] == [16, 16])
    assert first["reason"] in ("equal", "probe")
    for line in lines[1:]:
        assert sum(line["local_batches"]) == 32
        assert len(line["predicted_seconds"]) == 2
    for step, sizes in enumerate(zip(sizes0, sizes1, strict=True)):
        in_force = [line for line in lines if line["step"] <= step][-1]
        assert list(sizes) == in_force["local_batches"], f"step {step}"
    assert lines[1]["step"] <= 10


class Signalled(Regression):
    """Rank 1 is asked to stop in batch 3."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def signalled() -> tuple[int, int]:
    module = Signalled()
    trainer = make_trainer(HeteroStrategy(), 2)
    with contextlib.suppress(SystemExit):
        trainer.fit(module, DataLoader(Numbers(60), batch_size=3))
        return -1, -1
    return trainer.global_step, len(module.seen)


def test_a_signal_to_one_rank_stops_all_after_the_same_step() -> None:
    """SIGTERM sets a flag that travels with the next message; nothing hangs in a signal handler."""
    outs = run_ranks(2, signalled)
    assert outs[0] == outs[1]
    assert outs[0][0] in (4, 5)


class Normalized(Regression):
    """Needs two samples a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)).double()


def two_modules() -> Any:
    strategy = HeteroStrategy(shares=[15, 1], global_batch=16)
    trainer = make_trainer(strategy, 2, max_epochs=1)
    smallest = []
    for module in (Regression(), Normalized()):
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1
        trainer.fit(module, DataLoader(Numbers(48), batch_size=8))
        smallest.append(min(strategy.plan.local_batches))
    return smallest


def test_another_module_gets_a_planner_of_its_own() -> None:
    """What one module has taught says nothing of the next, which may need more samples on each rank."""
    assert run_ranks(2, two_modules) == [[1, 2]] * 2


CALLS: list[int] = []


def counted_mean(state: object, bucket: Any) -> Any:
    CALLS.append(1)
    return allreduce_hook(None, bucket)


def with_hook() -> int:
    strategy = HeteroStrategy(ddp_comm_hook=counted_mean)
    make_trainer(strategy, 2, max_epochs=1).fit(Regression(), DataLoader(Numbers(24), batch_size=4))
    return len(CALLS)


def test_the_users_communication_hook_runs() -> None:
    """On CPU too, where plain DDP drops it without a word."""
    assert run_ranks(2, with_hook) == [3, 3]


def ddp_with_hook() -> int:
    make_trainer(DDPStrategy(ddp_comm_hook=counted_mean), 2, max_epochs=1).fit(
        Regression(), DataLoader(Numbers(24), batch_size=4)
    )
    return len(CALLS)


def test_plain_ddp_drops_the_hook_on_cpu() -> None:
    """The failure beside it: the hook is never called, and nothing is said."""
    assert run_ranks(2, ddp_with_hook) == [0, 0]


def shuffled() -> DataLoader[Any]:
    return DataLoader(Numbers(40), batch_size=4, shuffle=True)


def resumed(folder: str) -> Any:
    whole, first, second = Regression(), Regression(), Regression()
    make_trainer(HeteroStrategy(shares=[3, 1]), 2, max_epochs=3).fit(whole, shuffled())
    path = f"{folder}/end-of-epoch.ckpt"
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2, max_epochs=1)
    trainer.fit(first, shuffled())
    trainer.save_checkpoint(path)
    trainer = make_trainer(HeteroStrategy(shares=[1, 1]), 2, max_epochs=3)
    trainer.fit(second, shuffled(), ckpt_path=path)
    return relative_error(parameters_of(second), parameters_of(whole)), trainer.global_step


def test_a_run_goes_on_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    """From a checkpoint, with another split, the next epochs are those of a run that was never interrupted."""
    for error, step in run_ranks(2, resumed, str(tmp_path)):
        assert error <= 1e-12
        assert step == 15


def again_in_this_process(folder: str) -> int:
    path = f"{folder}/epoch0.ckpt"
    options = {"limit_train_batches": 1, "max_epochs": 2}
    trainer = make_trainer(HeteroStrategy(shares=[3, 1]), 2, **options | {"max_epochs": 1})
    trainer.fit(Regression(), shuffled())
    trainer.save_checkpoint(path)
    strategy = HeteroStrategy(shares=[3, 1])
    trainer = make_trainer(strategy, 2, **options)
    trainer.fit(Regression(), shuffled())
    trainer.fit(Regression(), shuffled(), ckpt_path=path)
    return strategy.job.batches.next_step()


def test_a_fit_that_begins_where_the_last_one_ended_counts_its_first_batch(tmp_path: Path) -> None:
    """Two batches, and then the second one again: Lightning counts to two both times."""
    assert run_ranks(2, again_in_this_process, str(tmp_path)) == [3, 3]


class Looks(Callback):
    """Sees the Trainer's inside while it trains."""

    def __init__(self) -> None:
        self.during: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.during.append(inside(trainer))


class Logs(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx), batch_size=len(batch["y"]))


def inside(trainer: Any) -> dict[str, Any]:
    """The attributes of what the strategy may touch, and which objects a run's values go through."""
    owners = {
        "data": trainer._data_connector,
        "signals": trainer._signal_connector,
        "training": trainer.fit_loop.epoch_loop,
        "validating": trainer.fit_loop.epoch_loop.val_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
    }
    found: dict[str, Any] = {name: sorted(vars(owner)) for name, owner in owners.items()}
    for name in ("training", "validating", "validate", "test"):
        found[f"{name} results"] = id(owners[name]._results)
    return found | {
        "connector": id(trainer._logger_connector),
        "callbacks": list(map(id, trainer.callbacks)),
        "stopping": "on_train_epoch_end" in vars(trainer.early_stopping_callback),
    }


def left_as_it_was() -> Any:
    look, early = Looks(), EarlyStopping("val_loss", patience=9)
    trainer = make_trainer(HeteroStrategy(), 2, callbacks=[look, early], max_epochs=1)
    before = inside(trainer)
    trainer.fit(Logs(), DataLoader(Numbers(24), batch_size=4), DataLoader(Numbers(24), batch_size=4))
    after = inside(trainer)
    changed = {key for key in before if any(during.get(key) != before[key] for during in look.during)}
    metrics = [
        {key: float(value) for key, value in found.items()}
        for found in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
    ]
    return changed, [key for key in before if after[key] != before[key]], [sorted(found) for found in metrics]


def test_the_trainer_is_left_as_it_was() -> None:
    """What the strategy replaces on its Trainer for a run is Lightning's own again, and has what was logged."""
    for changed, left, (seen, logged, shown) in run_ranks(2, left_as_it_was):
        assert changed == {
            *("data", "training", "signals", "stopping", "connector", "callbacks"),
            *(f"{name} results" for name in ("training", "validating", "validate", "test")),
        }
        assert left == []
        assert seen == logged == ["loss", "val_loss"]
        assert shown == ["loss"]


SCRIPT = """
    import sys

    import torch
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_hetero

    class Line(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            if sys.argv[2] == "fails" and self.global_rank == 1 and batch_idx == 2:
                raise ArithmeticError("my own mistake")
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    if __name__ == "__main__":
        seed_everything(1)
        data = DataLoader(TensorDataset(torch.randn(40, 3), torch.randn(40, 1)), batch_size=4, shuffle=True)
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = Trainer(strategy=sys.argv[1], accelerator="cpu", devices=2, max_epochs=2, **quiet)
        trainer.fit(Line(), data)
        sys.stdout.write(f"steps {trainer.global_step}\\n")  # in one piece: both ranks write
"""


def run_script(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.run(
        [sys.executable, str(script), *args], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_script_with_lightnings_own_launcher(tmp_path: Path) -> None:
    """Nothing but the flag: Lightning starts the other rank, which trains and ends with the first."""
    run = run_script(tmp_path, "hetero", "works")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("steps 10") == 2


def test_a_script_with_spawned_processes(tmp_path: Path) -> None:
    """The same with processes that are spawned; as under plain DDP, only they know how far they came."""
    run = run_script(tmp_path, "hetero_spawn", "works")
    assert run.returncode == 0, run.stderr
    assert "`max_epochs=2` reached" in run.stderr


def test_a_script_in_which_one_rank_fails(tmp_path: Path) -> None:
    """The other rank names it and its mistake, and all processes end."""
    run = run_script(tmp_path, "hetero", "fails")
    assert run.returncode != 0
    assert "rank 1 (cpu) failed first: ArithmeticError: my own mistake" in run.stderr
