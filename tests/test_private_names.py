"""Each private thing of Lightning, torch and torchmetrics that the package touches is still there, as it was.

Run with the newest release of each, it says which name is gone from which library, and which files use it. An entry is
added to the tables when `tests/private_uses.py` finds a name that is missing in them.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchmetrics import MeanMetric

from tests.private_uses import defined, overrides, private_uses, trees, used_in, uses

RESULTS = "lightning.pytorch.trainer.connectors.logger_connector"


@cache
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def of_trainer(path: str) -> Callable[[], Any]:
    """What a new Trainer has under a path."""
    return lambda: attrgetter(path)(trainer())


def module(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(name)


def result_metric() -> Any:
    meta = _Metadata("training_step", "loss")
    meta.sync = _Sync()
    return _ResultMetric(meta, is_tensor=True)


OWNERS: dict[str, tuple[str, Callable[[], Any], list[str]]] = {  # library, how to get one, its names
    "Trainer": (
        "lightning",
        trainer,
        [
            "_accelerator_connector",
            "_data_connector",
            "_logger_connector",
            "_results",
            "_signal_connector",
            "_val_check_time_interval",
        ],
    ),
    "Trainer._data_connector": ("lightning", of_trainer("_data_connector"), ["_prepare_dataloader"]),
    "Trainer._signal_connector": ("lightning", of_trainer("_signal_connector"), ["_sigterm_notifier_fn"]),
    "Trainer._logger_connector": (
        "lightning",
        of_trainer("_logger_connector"),
        ["_evaluation_epoch_end"],
    ),
    "Trainer.fit_loop": (
        "lightning",
        of_trainer("fit_loop"),
        ["_combined_loader", "_data_fetcher", "_should_accumulate"],
    ),
    "Trainer.fit_loop.epoch_loop": (
        "lightning",
        of_trainer("fit_loop.epoch_loop"),
        [
            "_batches_that_stepped",
            "_broadcast_sigterm_tensor",
            "_results",
            "_save_loggers_on_train_batch_end",
            "_should_accumulate",
            "_should_check_val_fx",
        ],
    ),
    **{
        f"Trainer.{path}": (
            "lightning",
            of_trainer(path),
            ["_combined_loader", "_results"],
        )
        for path in ("fit_loop.epoch_loop.val_loop", "validate_loop", "test_loop")
    },
    "Trainer.predict_loop": ("lightning", of_trainer("predict_loop"), ["_combined_loader", "_predictions"]),
    "CombinedLoader": ("lightning", lambda: CombinedLoader([]), ["_mode"]),
    "_ResultCollection": (
        "lightning",
        lambda: _ResultCollection(training=True),
        ["_extract_batch_size", "_get_cache"],
    ),
    "_ResultMetric": ("lightning", result_metric, ["_computed", "_forward_cache", "_update_count"]),
    "_Metadata": ("lightning", lambda: _Metadata("training_step", "loss"), ["_sync"]),
    "_Sync": ("lightning", _Sync, ["_fn", "_should"]),
    "ModelCheckpoint": ("lightning", ModelCheckpoint, ["_every_n_train_steps", "_train_time_interval"]),
    "LightningModule": ("lightning", pl.LightningModule, ["_compiler_ctx", "_current_fx_name", "_trainer"]),
    "LightningOptimizer": ("lightning", lambda: LightningOptimizer, ["_optimizer"]),
    "LightningCLI": ("lightning", lambda: LightningCLI, ["_parser"]),
    "DDPStrategy": (
        "lightning",
        DDPStrategy,
        [
            "_accelerator",
            "_configure_launcher",
            "_ddp_comm_hook",
            "_ddp_comm_state",
            "_ddp_comm_wrapper",
            "_ddp_kwargs",
            "_layer_sync",
            "_pl_static_graph_delay_done",
            "_register_ddp_hooks",
            "_setup_model",
            "_timeout",
        ],
    ),
    "_IndexBatchSamplerWrapper": (
        "lightning",
        lambda: _IndexBatchSamplerWrapper(BatchSampler(SequentialSampler(range(4)), 2, drop_last=False)),
        ["_batch_sampler"],
    ),
    f"{RESULTS}.logger_connector": ("lightning", module(f"{RESULTS}.logger_connector"), ["_LoggerConnector"]),
    f"{RESULTS}.result": (
        "lightning",
        module(f"{RESULTS}.result"),
        ["_Metadata", "_OUT_DICT", "_ResultCollection", "_ResultMetric", "_Sync"],
    ),
    "lightning.pytorch.loops": ("lightning", module("lightning.pytorch.loops"), ["_EvaluationLoop", "_PredictionLoop"]),
    "lightning.fabric.strategies.registry": (
        "lightning",
        module("lightning.fabric.strategies.registry"),
        ["_StrategyRegistry"],
    ),
    "lightning.pytorch.overrides.distributed": (
        "lightning",
        module("lightning.pytorch.overrides.distributed"),
        ["_IndexBatchSamplerWrapper", "_sync_module_states"],
    ),
    "lightning.fabric.utilities.seed": (
        "lightning",
        module("lightning.fabric.utilities.seed"),
        ["_collect_rng_states", "_set_rng_states"],
    ),
    "lightning.pytorch.utilities.exceptions": (
        "lightning",
        module("lightning.pytorch.utilities.exceptions"),
        ["_augment_message"],
    ),
    "torch.nn.modules.batchnorm": ("torch", module("torch.nn.modules.batchnorm"), ["_BatchNorm"]),
    "BatchNorm1d": ("torch", lambda: torch.nn.BatchNorm1d(1), ["_check_input_dim"]),
    "torch.utils": ("torch", module("torch.utils"), ["_pytree"]),
    "torch.distributed.distributed_c10d": (
        "torch",
        module("torch.distributed.distributed_c10d"),
        ["_get_default_store"],
    ),
    "DataLoader": ("torch", lambda: DataLoader([0]), ["_iterator"]),
    "DistributedDataParallel": (
        "torch",
        lambda: DistributedDataParallel,
        [
            "_check_reducer_finalized",
            "_ddp_params_and_buffers_to_ignore",
            "_remove_autograd_hooks",
            "_static_graph_delay_allreduce_enqueued",
            "_sync_buffers",
        ],
    ),
    "Module": ("torch", lambda: torch.nn.Linear(1, 1), ["_modules", "_parameters"]),
    "Metric": (
        "torchmetrics",
        MeanMetric,
        [
            "_cache",
            "_computed",
            "_copy_state_dict",
            "_forward_cache",
            "_is_synced",
            "_reductions",
            "_should_unsync",
            "_sync_dist",
            "_should_unsync",
            "_to_sync",
            "_update_count",
        ],
    ),
}
"""Owners are new, so that they have what a run finds; where only a class is available, its source is searched."""


BEHIND_PRIVATE = [
    "_accelerator_connector.use_distributed_sampler",
    "_signal_connector.received_sigterm",
    "fit_loop.epoch_loop.batch_progress.current.ready",
    "fit_loop.epoch_loop.on_run_start",
    "fit_loop.on_advance_end",
    "fit_loop.run",
    "fit_loop.epoch_loop.val_loop.max_batches",
]
"""Public names that only private ones lead to."""


SIGNATURES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    f"{owner.__qualname__}.{name}": (getattr(owner, name), parameters)
    for owner, methods in {
        _LoggerConnector: {
            "_evaluation_epoch_end": ["self"],
            "on_batch_end": ["self"],
            "on_epoch_end": ["self"],
            "reset_results": ["self"],
            "update_eval_epoch_metrics": ["self"],
            "update_train_step_metrics": ["self"],
        },
        _ResultCollection: {
            "_extract_batch_size": ["self", "value", "batch_size", "meta"],
            "_get_cache": ["result_metric", "on_step"],
            "metrics": ["self", "on_step"],
            "update_metrics": ["self", "key", "value", "batch_size"],
        },
        _StrategyRegistry: {"register": ["self", "name", "strategy", "description", "override", "init_params"]},
        DDPStrategy: {
            "_configure_launcher": ["self"],
            "_register_ddp_hooks": ["self"],
            "_setup_model": ["self", "model"],
        },
        DistributedDataParallel: {"_sync_buffers": ["self"]},
        EarlyStopping: {"on_train_epoch_end": ["self", "trainer", "pl_module"]},
        MeanMetric: {
            "_sync_dist": ["self", "dist_sync_fn", "process_group"],
            "sync": ["self", "dist_sync_fn", "process_group", "should_sync", "distributed_available"],
        },
        torch.nn.BatchNorm1d: {"_check_input_dim": ["self", "input"]},
        _DataConnector: {"_prepare_dataloader": ["self", "dataloader", "shuffle", "mode"]},
        _SignalConnector: {"_sigterm_notifier_fn": ["self", "signum", "_"]},
        _TrainingEpochLoop: {
            "_broadcast_sigterm_tensor": ["self"],
            "_should_check_val_fx": ["self", "data_fetcher"],
        },
    }.items()
    for name, parameters in methods.items()
}
"""Of what is overridden or replaced, with its parameters."""


# ---- the guard ----


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, (_, _, names) in OWNERS.items() for name in names]
)
def test_it_is_still_there(owner: str, name: str) -> None:
    """Fails with the first release of a library that no longer has it."""
    library, get, _ = OWNERS[owner]
    one = get()
    there = name in dir(one)
    if inspect.isclass(one) and not there:  # set by a method, on an object that a test can't make
        there = re.search(rf"\b{name}\b", inspect.getsource(one)) is not None
    assert there, f"{library} {version(library)}: {owner} has no {name} any more; used in {used_in(name)}"


@pytest.mark.parametrize("path", BEHIND_PRIVATE)
def test_what_private_names_lead_to_is_still_there(path: str) -> None:
    attrgetter(path)(trainer())


@pytest.mark.parametrize("method", SIGNATURES)
def test_what_is_overridden_or_replaced_takes_the_same(method: str) -> None:
    """Fails when Lightning, torch or torchmetrics call it with something else."""
    function, expected = SIGNATURES[method]
    parameters = list(inspect.signature(function).parameters)
    assert parameters == expected, f"{method}({', '.join(parameters)}) was ({', '.join(expected)})"


# ---- the tables are complete ----


@pytest.mark.parametrize("name", uses())
def test_each_private_name_is_guarded(name: str) -> None:
    """Add it to `OWNERS`, or do without it."""
    assert any(name in names for _, _, names in OWNERS.values()), f"{', '.join(uses()[name])}: {name} is not guarded"


def test_each_override_is_guarded() -> None:
    """Add it to `SIGNATURES`."""
    guarded = {method.split(".")[1] for method in SIGNATURES}
    missing = {method: by for method, by in overrides().items() if method.split(".")[1] not in guarded}
    assert missing == {}, "overridden, but not guarded"


def test_nothing_is_guarded_that_is_not_used() -> None:
    """Take it out of `OWNERS`."""
    guarded = {name for _, _, names in OWNERS.values() for name in names}
    own = set().union(*map(defined, trees().values()))
    assert sorted(guarded - set(uses()) - own) == []


def test_a_private_name_is_found() -> None:
    """However it is reached; fails if the guard looks away."""
    code = """
from lightning import _imported
class Mine(Theirs):
    def __init__(self):
        self._own = 1
    def look(self, trainer):
        trainer.loop._attribute
        self._inherited
        self._own
        getattr(trainer, "_by_name", None)
        patch("loop._by_path")
        vars(trainer).update(_by_keyword=1)
"""
    tree = ast.parse(code)
    found = set(private_uses(tree, defined(tree), defined(tree)))
    assert found == {"_imported", "_attribute", "_inherited", "_by_name", "_by_path", "_by_keyword"}
