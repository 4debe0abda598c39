"""The Lightning strategy: wires the rooms into Lightning's hooks, and holds no logic of its own."""
# ruff: noqa: SLF001 - a strategy is part of Lightning's inside; what it touches of a Trainer is guarded by a test

import os
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_hetero.device import memory
from lightning_hetero.device.allocator import keep_freed_memory
from lightning_hetero.device.step_timer import compute_timer
from lightning_hetero.exchange import consistency, failures
from lightning_hetero.exchange.duplicate_data import USER_SHARDS, DuplicateDataCheck, content_hash
from lightning_hetero.exchange.groups import RankGroup, own_total, total
from lightning_hetero.exchange.long_backward import LongBackwardMonitor
from lightning_hetero.exchange.messages import StepMessages
from lightning_hetero.exchange.secondary_failures import CollectiveErrors
from lightning_hetero.exchange.store import default_store
from lightning_hetero.planning.memory import Caps
from lightning_hetero.planning.plan import Plan
from lightning_hetero.planning.planner import Planner, Shares
from lightning_hetero.sampling.train_sampler import Position
from lightning_hetero.step import loss_count
from lightning_hetero.step.batch_norm import smallest_local_batch
from lightning_hetero.step.buffers import BufferMerge, broadcast_apart, broadcast_in_forward
from lightning_hetero.step.gradients import averaging_hook, masked, until_last_bucket
from lightning_hetero.step.step import TrainingSteps
from lightning_hetero.step.sync_batch_norm import BatchNormGroup
from lightning_hetero.trainer.checks import check_devices, check_job, check_options, check_trainable
from lightning_hetero.trainer.dataloaders import Context, Loaders
from lightning_hetero.trainer.evaluation import Evaluating
from lightning_hetero.trainer.layer_sync import ExactSyncBatchNorm
from lightning_hetero.trainer.metric_synchronizer import MetricSynchronizer
from lightning_hetero.trainer.observer import Observer
from lightning_hetero.trainer.patches import StepCallback, StopRequest, TrainerPatches
from lightning_hetero.trainer.profile_store import ProfileStore, run_folder
from lightning_hetero.trainer.reporting import device_name
from lightning_hetero.trainer.results import MetricExchange
from lightning_hetero.trainer.step_logging import StepLogging
from lightning_hetero.trainer.survival import Survival, name_unused


class HeteroStrategy(Evaluating):
    """Data parallelism on unequal devices: every global batch is split so that all devices finish together.

    The averaged gradient is the gradient of the global batch, however unevenly it is split, and which samples make up
    global batch k depends neither on the number of devices nor on their speeds.

    Args:
        shares: ``"auto"`` learns how much each device can do, and begins with what an earlier run of the same job in
            the run's folder has learnt; the path of a ``profile.json`` begins with that one; ``"equal"`` splits as
            plain DDP does; one number a rank, such as ``[4, 1]``, is a fixed proportion.
        global_batch: samples in a step over all ranks; None means the loader's ``batch_size`` times the number of
            ranks, what DDP would use. With several training loaders it holds for each of them.
        loss_count: from the module and a batch, as ``training_step`` gets it, to the number that the loss is a mean
            over. None: the module's own ``loss_count(batch)``, what is known of TorchGeo's tasks, or samples.
        memory_limit: the part of a device's memory that a rank may hold, or bytes if it is above 1. A rank whose
            share would need more is capped, and the others get the rest.
        granularity: local batches are multiples of it, but for the last of an epoch.
        gradient_as_bucket_view: DDP's own option, on by default here: gradients need no copy.
        **ddp_options: all that Lightning's ``DDPStrategy`` takes.

    Raises:
        ValueError: an argument can't be used, in one sentence.
    """

    def __init__(
        self,
        shares: Shares = "auto",
        global_batch: int | None = None,
        loss_count: Callable[[Any, Any], Any] | None = None,  # jsonargparse takes no more exact type
        memory_limit: float = 0.9,
        granularity: int = 1,
        gradient_as_bucket_view: bool = True,
        **ddp_options: Any,
    ) -> None:
        check_options(shares, global_batch, memory_limit, granularity)
        self._trainers_accelerator: Accelerator | None = None
        super().__init__(gradient_as_bucket_view=gradient_as_bucket_view, **ddp_options)
        self._shares = shares
        self._global_batch = global_batch
        self._loss_count = loss_count
        self._memory_limit = memory_limit
        self._granularity = granularity
        self._batches = 0  # training batches begun since the strategy was made
        self._exchange: RankGroup | None = None
        self._planner: Planner | None = None
        self._loaders: Loaders | None = None
        self._attachment: TrainerPatches | None = None
        self._stop: StopRequest | None = None
        self._watch: LongBackwardMonitor | None = None
        self._steps: TrainingSteps | None = None
        self._logging: StepLogging | None = None
        self._merge: BufferMerge | None = None
        self._ties: BatchNormGroup | None = None
        self._same_data = DuplicateDataCheck()
        self._content = 0.0
        self._last_ready = -1
        self._observer: Observer | None = None  # on the first rank, while it trains
        self._devices: list[str] = []
        self._on_cpus = False  # all ranks: they know what a step has taken them as soon as it is over
        self._limits: tuple[float, ...] = ()  # bytes that each rank may hold
        self._survival: Survival | None = None
        self._launched = False
        self._run = 0  # see `failures.new_run`
        self._averaging_errors = CollectiveErrors()
        self._learnt: ProfileStore | None = None
        self._planned: dict[str, Any] = {}  # the job that the planner is for

    @property
    def plan(self) -> Plan:
        """The plan in force.

        Raises:
            RuntimeError: there is none before the training loader is set up, nor where the user shards.
        """
        if self._planner is None:
            raise RuntimeError(
                "there is no plan: it is made with the training loader, and stays in the process that trains"
            )
        return self._planner.schedule.at(max(0, self._batches - 1))

    # ---- before and after a run ----

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        # Kept apart from one that the user gave to the constructor: a second Trainer would find it and complain of
        # that, before `_configure_launcher` can say what is wrong.
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
        # Whoever starts the processes elsewhere may have given each of them a core of its own already.
        if (
            warning
            and self.cluster_environment is not None
            and not self.cluster_environment.creates_processes_externally
        ):
            rank_zero_warn(warning)
        check_job(self._shares, self._global_batch, self.world_size)
        super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        if self._exchange is None:
            if self.root_device.type == "cpu":
                keep_freed_memory()
            self._clock = compute_timer(self.root_device)
            self._exchange = RankGroup(self.global_rank, self.world_size, self._timeout)
            self._devices = self._exchange.gather(device_name(self.root_device))
            self._on_cpus = set(self._devices) == {"cpu"}
            self._learnt = ProfileStore(self._shares, self._exchange, self.root_device)
            if type(self._layer_sync) is TorchSyncBatchNorm and self.world_size > 1:
                self._ties = BatchNormGroup(
                    self.global_rank, self.world_size, own_total(self._timeout), self._clock.waiting
                )
                self._layer_sync = ExactSyncBatchNorm(self._ties)
            rooms = self._exchange.gather(memory.memory_capacity(self.root_device))
            self._limits = memory.memory_limits(rooms, self._memory_limit)
        seed = int(os.environ.get("PL_GLOBAL_SEED") or torch.initial_seed())
        seed, self._run = self._exchange.broadcast((seed, failures.new_run()))
        self._attach(self.lightning_module.trainer, seed % 2**32)

    def _attach(self, trainer: "pl.Trainer", seed: int) -> None:
        assert self._exchange is not None
        if self._attachment is not None:  # a run that was interrupted may not have been torn down
            self._attachment.remove()
        context = Context(
            exchange=self._exchange,
            seed=seed,
            global_batch=self._global_batch,
            planner=self._planner_for,
            evaluation=self._evaluations(self._exchange, self._shares, lambda: self._planner),
            position=lambda: Position(trainer.current_epoch, self._batches),
            on_borrow=lambda: self._steps.remember_random_states() if self._steps is not None else None,
        )
        self._loaders = Loaders(trainer, context)
        talk = MetricExchange(
            self._exchange, self._clock.waiting, self.reduce, trainer.lightning_module, self.root_device
        )
        truth = (
            MetricSynchronizer(trainer, talk, self._loss_count, self._take_over_metrics)
            if self.world_size > 1
            else None
        )
        self._logging = StepLogging(trainer.fit_loop.epoch_loop._results, truth)
        self._stop = StopRequest(trainer)
        self._attachment = TrainerPatches(
            trainer,
            prepare_dataloader=self._loaders.prepare,
            before_batch=self._before_batch,
            stop=self._stop,
            callback=StepCallback(self._batch_over, self._epoch_over, self._merge_buffers),
            more=self._logging.patches(),
        )

    def _planner_for(self, global_batch: int) -> Planner:
        """The planner for the first training loader's global batch; what was learnt for the same one is kept."""
        first = self._loaders is None or self._loaders.first_in_round
        assert self.lightning_module is not None
        minimum = smallest_local_batch(self.lightning_module, synchronised=self._ties is not None)
        job = consistency.job(self.lightning_module, self.lightning_module.trainer.precision)
        key = {**job, "global batch": global_batch, "minimum": minimum}
        if self._planner is None or (first and self._planned != key):
            self._planned = key
            assert self._learnt is not None
            known = self._learnt.find(self.lightning_module, global_batch)
            self._planner = Planner(
                self._shares,
                self.world_size,
                global_batch,
                minimum=minimum,
                granularity=self._granularity,
                known=known,
                speeds=self._learnt.probe() if known is None and self._on_cpus else None,
                memory=lambda total, least: Caps(
                    self._limits, self._devices, total, minimum=least, granularity=self._granularity
                ),
            )
        return self._planner

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        assert self.lightning_module is not None
        assert self._exchange is not None
        if trainer.state.fn == TrainerFn.FITTING:
            check_trainable(self.lightning_module)
            consistency.require(self._exchange, consistency.facts(self.lightning_module, trainer.precision), "the job")
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_ready = -1
            if self._planner is not None:
                self._planner.forget_memory()
            counter = loss_count.find(
                self.lightning_module,
                self._loss_count,
                lambda batch: loss_count.sample_count(batch, self._steps.samples if self._steps is not None else None),
            )
            if counter.advice:
                rank_zero_warn(counter.advice)
            self._watch = LongBackwardMonitor(self.global_rank, self.world_size, default_store())
            self._steps = TrainingSteps(
                self.lightning_module,
                counter,
                self._exchange,
                self.root_device,
                self._clock,
                self._watch,
                self._hear,
                self._ties,
            )
            self._steps.fits_in_memory = lambda split: self._planner is not None and self._planner.fits_in_memory(split)
            self._survival = Survival(
                self.lightning_module,
                self.model,
                self.precision_plugin,
                self._steps,
                place=f"rank {self.global_rank} ({device_name(self.root_device)})",
                hooked=self._ddp_comm_hook is not None or self._ddp_comm_wrapper is not None,
            )

    @override
    def _setup_model(self, model: Module) -> DistributedDataParallel:
        wrapped = super()._setup_model(model)
        broadcasts = broadcast_in_forward(self._ddp_kwargs)
        if broadcasts is None:
            # Set afterwards: older versions of torch take the option for the copy at the start as well.
            wrapped.broadcast_buffers = False
        if broadcasts:
            broadcast_apart(wrapped, self._clock.waiting)
        else:
            self._merge = BufferMerge(
                model, self.root_device, self.global_rank, self.world_size, total, self._clock.waiting
            )
        return wrapped

    def _merge_buffers(self) -> None:
        # A rank that fails may save a checkpoint, while the others sit in another exchange.
        module = self.lightning_module
        if self._merge is not None and module is not None and not module.trainer.interrupted:
            self._merge.merge()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._merge_buffers()
        return super().lightning_module_state_dict()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        folder = run_folder(trainer)  # all ranks ask together
        if self._planner is not None and self.is_global_zero:
            self._observer = Observer(trainer, self._planner, self._devices, self._granularity, folder)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._pause_observer()

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        self._pause_observer()

    def _pause_observer(self) -> None:
        if self._observer is not None:
            self._observer.pause()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._observer is not None:
            self._observer.end_run()
        if self._learnt is not None and self.lightning_module is not None:
            self._learnt.keep(self.lightning_module.trainer, self._planner)

    @override
    def teardown(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._steps = self._survival = self._merge = self._observer = None
        super().teardown()

    @override
    def on_exception(self, exception: BaseException) -> None:
        name_unused(exception)
        failures.explain(
            exception,
            run=self._run,
            rank=self.global_rank,
            device=device_name(self.root_device),
            averaging=self._averaging_errors,
        )

    # ---- a training step ----

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self._steps is not None and self._is_new_batch():
            assert self._loaders is not None
            shares = self._loaders.take(self._batches)
            self._steps.arrive(shares[0] if shares else None)
            if self._merge is not None:
                self._merge.count(shares[0] if shares else None, batch)
            self._content = 0.0
            if self._loaders.user_shards and self._batches < DuplicateDataCheck.WATCHED:
                self._content = content_hash(batch, self._loaders.index_hash() or "")
            self._batches += 1
        return super().batch_to_device(batch, device, dataloader_idx)

    def _is_new_batch(self) -> bool:
        """Whether the training loop has just fetched a batch; a module may move further data by itself."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        ready = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if trainer.state.stage != RunningStage.TRAINING or ready == self._last_ready:
            return False
        self._last_ready = ready
        return True

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._steps is not None
        assert self._loaders is not None
        assert self._logging is not None
        assert self._survival is not None
        if isinstance(args[0], Iterator):
            raise TypeError(
                "training_step(dataloader_iter) fetches its batches by itself, so they can't be counted: take a batch"
            )
        self._steps.begin(
            self._batches - 1,
            args[0],
            drawn=self._loaders.drawn(),
            content=self._content,
            stop=self._stop is not None and self._stop.made,
        )
        with self._steps.logged(self._logging) as returned, self._survival.explained():
            if (recovery := self._survival.recovery) is not None:
                output = recovery.training_step(self._logging, *args, **kwargs)
            else:
                output = super().training_step(*args, **kwargs)
            returned(output)
        return output

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self._steps is not None
        averaged = (
            self.world_size > 1
            and self._ddp_comm_hook is None  # a user's may not wait for the other ranks
            and isinstance(self.model, DistributedDataParallel)
            and self.model.require_backward_grad_sync
        )
        manual = self.lightning_module is not None and not self.lightning_module.automatic_optimization
        assert self._survival is not None
        recovery = self._survival.recovery
        with (
            self._survival.explained(),
            self._steps.weighted(closure_loss, averaged=averaged and recovery is None, masks_accumulate=manual) as loss,
        ):
            if recovery is not None:
                return self._survival.backward(recovery, loss, closure_loss, average=averaged)
            return super().backward(loss, optimizer, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if isinstance(getattr(optimizer, "_optimizer", optimizer), LBFGS):
            assert self._steps is not None
            closure = self._steps.global_loss(closure, self.reduce)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def _before_batch(self) -> None:
        if self._observer is not None:
            self._observer.begin_batch()
        if self._on_cpus and self._steps is not None and self._planner is not None and self._planner.wants_reports_now:
            assert self._loaders is not None
            self._steps.tell(self._batches, drawn=self._loaders.drawn())
        self._clock.start()

    def _batch_over(self) -> None:
        assert self._steps is not None
        assert self.lightning_module is not None
        stepped = (
            not self.lightning_module.trainer.fit_loop._should_accumulate()
            or not self.lightning_module.automatic_optimization
        )
        self._steps.end(stepped=stepped, global_batch=self._planner.global_batch if self._planner is not None else None)
        assert self._logging is not None
        self._logging.batch_over(self._steps.loss_weight)
        if self._observer is not None:
            self._observer.end_batch(self._batches - 1, stepped=stepped)

    def _epoch_over(self) -> None:
        assert self._steps is not None
        self._steps.leave_epoch(self._batches)
        assert self._logging is not None
        self._logging.epoch_over()
        self._pause_observer()

    def _hear(self, messages: StepMessages) -> None:
        """All ranks' messages of a step."""
        assert self.lightning_module is not None
        if self._stop is not None and messages.stop_requested.any():
            self._stop.grant()
        self._same_data.check(messages, self.lightning_module.trainer.num_training_batches, USER_SHARDS)
        if self._planner is None:
            return
        reports = messages.reports()
        news = self._planner.update(reports)
        for sentence in news.sentences:
            rank_zero_warn(sentence)
        if self._observer is not None:
            self._observer.update(self._planner, reports, news.plans)

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        hook = self._ddp_comm_hook or averaging_hook(self._averaging_errors)
        if self._ddp_comm_wrapper is not None:
            hook = self._ddp_comm_wrapper(hook)
        if self.world_size > 1:
            users = self._ddp_comm_hook is not None or self._ddp_comm_wrapper is not None
            hook = masked(hook, lambda: self._steps.mask if self._steps is not None else None)
            self.model.register_comm_hook(self._ddp_comm_state, until_last_bucket(hook, self._clock, may_wait=users))

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        for name, description, options in (
            ("hetero", "Data parallelism on unequal devices", {}),
            ("hetero_find_unused_parameters_true", "The same, for unused parameters", {"find_unused_parameters": True}),
            ("hetero_spawn", "The same, with spawned processes", {"start_method": "spawn"}),
        ):
            strategy_registry.register(name, cls, description=description, override=True, **options)
