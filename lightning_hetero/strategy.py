"""The Lightning strategy: each of Lightning's hooks in a few lines."""
# ruff: noqa: SLF001 - Lightning's strategies need its private names; `tests/test_private_names.py` guards them

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_hetero.exchange import consistency, failures
from lightning_hetero.exchange.store import default_store
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.shares import Shares
from lightning_hetero.step.buffers import BufferMerge, broadcast_in_forward, set_broadcast
from lightning_hetero.step.gradients import averaging_hook, masked_hook, timed_hook
from lightning_hetero.step.trainable import TrainableParameters, TrainableSet
from lightning_hetero.step.wrapping import wrap_anew
from lightning_hetero.trainer.fit import Fit
from lightning_hetero.trainer.hooks import TrainingHooks
from lightning_hetero.trainer.job import Job
from lightning_hetero.trainer.layer_sync import ExactSyncBatchNorm
from lightning_hetero.trainer.log_dir import BroadcastCache, in_evaluation_batch
from lightning_hetero.trainer.options import Options, check_devices
from lightning_hetero.trainer.planner_cache import NO_PLAN
from lightning_hetero.trainer.run import Run
from lightning_hetero.trainer.unused_parameters import explain_unused_parameters


class HeteroStrategy(DDPStrategy):
    """Data parallelism on unequal devices: every global batch is split so that all devices finish together.

    The averaged gradient is the gradient of the global batch, however unevenly it is split, and which samples make up
    global batch k depends neither on the number of devices nor on their speeds.

    Args:
        shares: ``"auto"`` measures how fast each device is, starting from the profile of an earlier run of the same job
            if the run's folder has one; the path of a ``profile.json`` starts from that profile; ``"equal"`` splits as
            plain DDP does; one number per rank, such as ``[4, 1]``, fixes the proportions.
        global_batch: samples in a step over all ranks; None means the loader's ``batch_size`` times the number of
            ranks, as under DDP. With several training loaders it applies to each of them.
        loss_count: from the module and a batch, as ``training_step`` gets it, to the number that the loss is a mean
            over. None: the module's own ``loss_count(batch)``, the rule of a known TorchGeo task, or samples.
        memory_limit: the fraction of a device's memory that a rank may use, or bytes if it is above 1. A rank whose
            share would need more is capped, and the others get the rest.
        granularity: local batches are multiples of it, except in the last global batch of an epoch.
        gradient_as_bucket_view: DDP's own option, on by default here: gradients need no copy.
        **ddp_options: any other option of Lightning's ``DDPStrategy``.

    Raises:
        ValueError: an argument can't be used; one sentence says why.
    """

    def __init__(
        self,
        shares: str | Sequence[float] = "auto",
        global_batch: int | None = None,
        loss_count: Callable[[Any, Any], Any] | None = None,  # jsonargparse accepts no more precise type
        memory_limit: float = 0.9,
        granularity: int = 1,
        gradient_as_bucket_view: bool = True,
        **ddp_options: Any,
    ) -> None:
        self._options = Options(Shares.parse(shares), global_batch, loss_count, memory_limit, granularity)
        self._trainers_accelerator: Accelerator | None = None
        super().__init__(gradient_as_bucket_view=gradient_as_bucket_view, **ddp_options)
        self._launched = False
        self._job: Job | None = None  # from the first run's setup on
        self._run: Run | None = None  # while the Trainer runs
        self._fit: Fit | None = None  # while it trains
        self._buffers: BufferMerge | None = None  # of the wrapped module; None where DDP copies rank 0's
        self._trainable: TrainableParameters | None = None  # of the wrapped module

    @property
    def plan(self) -> Plan:
        """The plan in force.

        Raises:
            RuntimeError: the training loader is not set up yet, or the user shards the data.
        """
        return self.job.planner_cache.plan_at(max(0, self.job.batches.next_step() - 1))

    @property
    def job(self) -> Job:
        """What this process keeps from run to run; raises a RuntimeError before the first one."""
        if self._job is None:
            raise RuntimeError(NO_PLAN)
        return self._job

    @property
    def run(self) -> Run:
        """The Trainer's current run; raises a RuntimeError while there is none."""
        if self._run is None:
            raise RuntimeError("the strategy belongs to a running Trainer: call fit, validate, test or predict")
        return self._run

    @property
    def fit(self) -> Fit:
        """The current training; raises a RuntimeError while there is none."""
        if self._fit is None:
            raise RuntimeError("training_step, backward and optimizer_step of the strategy belong to Trainer.fit")
        return self._fit

    # ---- before and after a run ----

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        # Kept separate from one that the user passed to the constructor: a second Trainer would find it there and
        # raise an error about that, before `_configure_launcher` can say what is wrong.
        return self._accelerator or self._trainers_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._trainers_accelerator = accelerator

    @override
    def _configure_launcher(self) -> None:
        if self._launched:
            raise ValueError("this HeteroStrategy already belongs to a Trainer; give each Trainer one of its own")
        self._launched = True
        warning = check_devices(self.parallel_devices or [])
        # A launcher other than Lightning's may already have pinned each process to a core of its own.
        starts_processes = self.cluster_environment and not self.cluster_environment.creates_processes_externally
        if warning and starts_processes:
            rank_zero_warn(warning)
        self._options.check_world_size(self.world_size)
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._job is None:
            sync_batch_norm = type(self._layer_sync) is TorchSyncBatchNorm
            self._job = Job.start(
                self._options,
                self.global_rank,
                self.world_size,
                self.root_device,
                self._timeout,
                sync_batch_norm=sync_batch_norm,
                current_hook=self._current_hook,
            )
            if self._job.batch_norm_group is not None:
                self._layer_sync = ExactSyncBatchNorm(self._job.batch_norm_group)
        if self._run is not None:  # one that was interrupted may not have been torn down
            self._run.end()
        if self.lightning_module is None:
            raise RuntimeError("Lightning connects the module before it sets up the environment")
        hooks = TrainingHooks(self._before_batch, self._end_batch, self._end_epoch, self._pause_training)
        self._run = Run(self._job, self.lightning_module.trainer, hooks)

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            facts = consistency.facts(trainer.lightning_module, trainer.precision)
            consistency.require_equal(self.job.group, facts, "the job")
        super().setup(trainer)

    @override
    def _setup_model(self, model: Module) -> Module:  # type: ignore[override] # not wrapped if nothing trains yet
        job, wrapped = self.job, model
        if TrainableSet.of(model).named:
            wrapped = super()._setup_model(model)
            set_broadcast(wrapped, self._ddp_kwargs, job.timer.waiting)
        else:
            _sync_module_states(model)  # as DDP does
        if not broadcast_in_forward(self._ddp_kwargs):
            self._buffers = BufferMerge(model, job.device, job.group.rank, job.group.world_size, job.timer.waiting)
        self._trainable = TrainableParameters(model, job.group.rank, default_store())
        return wrapped

    @override
    def _register_ddp_hooks(self) -> None:
        if self.world_size == 1 or not isinstance(self.model, DistributedDataParallel):
            return
        hook = self._ddp_comm_hook or averaging_hook(self.job.gradient_errors)
        if self._ddp_comm_wrapper is not None:
            hook = self._ddp_comm_wrapper(hook)
        hook = masked_hook(hook, self.job.mask.current)
        hook = timed_hook(hook, self.job.timer, may_wait=self._has_custom_hook)
        self.model.register_comm_hook(self._ddp_comm_state, hook)

    @property
    def _has_custom_hook(self) -> bool:
        """Whether the user gave DDP a communication hook, or a wrapper for one."""
        return self._ddp_comm_hook is not None or self._ddp_comm_wrapper is not None

    @override
    def teardown(self) -> None:
        if self._fit is not None:
            self._fit.close()
        if self._run is not None:
            self._run.end()
        self._fit = self._run = self._buffers = self._trainable = None
        super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain_unused_parameters(exception)
        if self._run is not None:
            failures.explain(exception, self._run.job.group.waits, self._run.job.gradient_errors)

    # ---- buffers: merged before they are read ----

    def _merge_buffers(self, call: str) -> None:
        # A rank that fails may save a checkpoint while the others wait in another exchange.
        if self._buffers is not None and self._buffers.is_due and not self._is_interrupted():
            with self._call_of_all_ranks(call):
                self._buffers.merge()

    def _is_interrupted(self) -> bool:
        """Whether this rank has failed or was interrupted, and so runs hooks that the others don't."""
        return self._run is not None and self._run.trainer.interrupted

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._merge_buffers("save_checkpoint")
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with nullcontext() if self._is_interrupted() else self._call_of_all_ranks("save_checkpoint"):
            super().save_checkpoint(*args, **kwargs)
        if self._fit is not None:
            self._fit.pause()

    # ---- training ----

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._trainable is None:
            raise RuntimeError("Lightning wraps the module before it trains")
        self._fit = Fit(self.run, self.model, self._buffers, self._trainable, custom_hook=self._has_custom_hook)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.fit.end()
        self.fit.close()
        self._fit = None

    def _before_batch(self) -> None:
        self.fit.before_batch()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        # A module may move other data too: only the batches that the training loop has fetched are counted.
        is_training = self.run.trainer.state.stage == RunningStage.TRAINING
        if self._fit is not None and is_training and self._current_hook() == "batch_to_device":
            self._fit.load(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        new = self.fit.begin_step(args[0])
        if new is not None:
            self._wrap_anew(new)
        return self.fit.training_step(super().training_step, *args, **kwargs)

    def _wrap_anew(self, new: Sequence[nn.Parameter]) -> None:
        """Wrap the module for the parameters that train now, `new` ones among them, on all ranks together."""
        module = self.run.trainer.lightning_module
        if self.job.batch_norm_group is not None and self._layer_sync is not None:
            self._layer_sync.apply(module)  # new layers
        self.model = wrap_anew(module, self.model, new, self.root_device, self._ddp_kwargs)
        self._pl_static_graph_delay_done = False
        if isinstance(self.model, DistributedDataParallel):
            set_broadcast(self.model, self._ddp_kwargs, self.job.timer.waiting)
        self._register_ddp_hooks()
        self.fit.wrapped_anew(self.model)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        def compute(loss: Tensor) -> Tensor:
            return super(HeteroStrategy, self).backward(loss, optimizer, *args, **kwargs)

        averaged = (
            self.world_size > 1
            and self._ddp_comm_hook is None  # a user's hook may not wait for the other ranks
            and isinstance(self.model, DistributedDataParallel)
            and self.model.require_backward_grad_sync
        )
        return self.fit.backward(compute, closure_loss, averaged=averaged)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if isinstance(getattr(optimizer, "_optimizer", optimizer), LBFGS):
            closure = self.fit.global_loss(closure, self.reduce)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _end_batch(self) -> None:
        self.fit.end_batch()

    def _end_epoch(self) -> None:
        self.fit.end_epoch()

    def _pause_training(self) -> None:
        self._merge_buffers("merging buffers")
        if self._fit is not None:
            self._fit.pause()

    # ---- evaluation: without DDP's wrapper, which may exchange buffers ----

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self.run.evaluate(self.run.trainer.lightning_module.validation_step, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self.run.evaluate(self.run.trainer.lightning_module.test_step, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self.run.evaluate(self.run.trainer.lightning_module.predict_step, *args, **kwargs)

    # ---- exchanges by Lightning and the user's code: not compute time ----

    def _current_hook(self) -> str | None:
        """The hook of the module, a callback or the data module that is running, for errors."""
        return self.lightning_module._current_fx_name if self.lightning_module is not None else None

    @contextmanager
    def _call_of_all_ranks(self, name: str, tensor: Tensor | None = None, group: Any = None) -> Iterator[None]:
        """A call inside is over DDP's group; before it, ranks check that all make it, see `require_same_call`."""
        if self._job is None or self.world_size == 1 or not torch.distributed.is_initialized():
            yield
            return
        with self._job.timer.waiting():
            if self._fit is not None:
                self._fit.receive()
            consistency.require_same_call(self._job.group, name, tensor, group)
            yield

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not isinstance(tensor, Tensor):
            return super().reduce(tensor, group, reduce_op)  # nothing to communicate
        if reduce_op in ("mean", "avg") and not tensor.is_floating_point():
            # Lightning averages the sample counts of logged values as integers, rounded down: 55 on 3 ranks is 18.
            tensor = tensor.double()
        with self._call_of_all_ranks("reduce", tensor, group):
            return super().reduce(tensor, group, reduce_op)

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        # A rank that fails runs hooks with barriers in them while the others wait in another exchange.
        if self._is_interrupted():
            return
        with self._call_of_all_ranks(f"barrier({name!r})" if name else "barrier"):  # Lightning's have names
            super().barrier(name, *args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        log_dirs = self._run.log_dirs if self._run is not None and src == 0 else BroadcastCache()
        if obj in log_dirs and in_evaluation_batch(self.lightning_module):
            return log_dirs[obj]
        with self._call_of_all_ranks("broadcast"):
            result = super().broadcast(obj, src)
        log_dirs.add(obj, result)
        return result

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        with self._call_of_all_ranks("all_gather", tensor, group):
            return super().all_gather(tensor, group, sync_grads)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for name, description, options in (
            ("hetero", "Data parallelism on unequal devices", {}),
            ("hetero_find_unused_parameters_true", "The same, for unused parameters", {"find_unused_parameters": True}),
            ("hetero_spawn", "The same, with spawned processes", {"start_method": "spawn"}),
        ):
            strategy_registry.register(name, cls, description=description, override=True, **options)
