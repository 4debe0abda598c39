"""One training: what happens in each of its steps, in order."""
# ruff: noqa: SLF001 - `tests/test_private_names.py` guards what is read of the Trainer

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_hetero.device.peak_memory import PeakMemory
from lightning_hetero.exchange.messages import FETCHES, LEFT_EPOCH, TRAINS, PendingMessages, StepMessage
from lightning_hetero.step import loss_count
from lightning_hetero.step.batch_contents import sample_count_or_one
from lightning_hetero.step.buffers import BufferMerge, follow_steps
from lightning_hetero.step.compute_times import ComputeTimes
from lightning_hetero.step.gradients import average_gradients
from lightning_hetero.step.memory_use import MemoryUse
from lightning_hetero.step.out_of_memory import PartialStep, StepInParts
from lightning_hetero.step.step import LoadedBatch, LocalCount, Step, StepContext
from lightning_hetero.step.trainable import TrainableParameters
from lightning_hetero.step.wrapping import bypass
from lightning_hetero.step.zero_count import ZeroCountWarning
from lightning_hetero.trainer.fit_messages import FitMessages
from lightning_hetero.trainer.options import check_trainable
from lightning_hetero.trainer.passes import loss_of, make_recovery
from lightning_hetero.trainer.run import Run
from lightning_hetero.trainer.skipped_steps import SKIPPED, StepsWithNothing


class Fit:
    """The training of a run, from `on_train_start` to `on_train_end`; made on all ranks together.

    Args:
        run: the call of the Trainer.
        model: the module as the strategy has wrapped it.
        buffers: merges the ranks' buffers; None where DDP copies rank 0's in each step.
        trainable: the parameters that train, as DDP knows them.
        custom_hook: whether the user gave DDP a communication hook, or a wrapper for one.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module | None,
        buffers: BufferMerge | None,
        trainable: TrainableParameters,
        *,
        custom_hook: bool,
    ) -> None:
        job, module = run.job, run.trainer.lightning_module
        self._run = run
        self._job = job
        self._module = module
        self._recovery_for = partial(
            make_recovery, module, precision=run.trainer.precision_plugin, place=job.place, custom_hook=custom_hook
        )
        self._recovery = self._recovery_for(model)
        self._buffers = buffers
        self._trainable = trainable
        run.loaders.begin_training()
        counter = loss_count.find_loss_counter(module, job.options.loss_count)
        if counter.advice:
            rank_zero_warn(counter.advice)
        self._times = ComputeTimes()
        self._memory = MemoryUse(PeakMemory(job.device), job.group.rank, job.group.world_size)
        self._messages = FitMessages(run, self._times, self._memory)
        self._context = StepContext(
            module=module,
            counter=counter,
            group=job.group,
            device=job.device,
            timer=job.timer,
            mask=job.mask,
            zero_counts=ZeroCountWarning(counter.rule, job.group.rank),
            batch_norm_group=job.batch_norm_group,
        )
        self._nothing = StepsWithNothing.of(module, self._context, job.place)
        self._loaded: LoadedBatch | None = None  # from the batch to its end
        self._step: Step | None = None  # from the call of training_step to the end of the batch
        self._risky = False  # a rank has more samples than it is known to be able to compute; the same on all ranks
        self._in_parts: StepInParts | None = None  # if the step can recover from that
        run.early_stop.exchange()  # the hooks at the start of training are over
        job.group.waits.watch()

    @property
    def borrowed(self) -> bool:
        """Whether this rank computes other ranks' samples in the current step."""
        return self._loaded is not None and self._loaded.borrowed

    # ---- the events of a step, in order ----

    def before_batch(self) -> None:
        """A batch is about to be fetched: while plans may still change, CPU ranks exchange measurements first.

        They do not between the micro-batches of an optimizer step.
        """
        self._messages.reporter.begin_batch()
        job = self._job
        if job.on_cpus and self._messages.planner.is_exploring and not self._times.accumulates:
            messages = self._messages.start(FETCHES, job.batches.next_step()).receive()
            messages.check()
            self._messages.update(messages)
        job.timer.start()

    def load(self, batch: Any) -> None:
        """A batch has been fetched."""
        job = self._job
        step = job.batches.begin()
        share, samples = self._run.loaders.take(step)
        self._step = self._in_parts = None
        self._loaded = LoadedBatch(step, share, samples, self._module)
        self._run.metrics.begin_batch(batch, samples, self._loaded.before_borrowed)
        if job.batch_norm_group is not None:
            job.batch_norm_group.begin_step(borrowed=self.borrowed)
        self._memory.start(samples or 0)
        if (share := self._loaded.share) is not None:
            unproven = self._memory.exceeds_completed(share.counts)
            self._risky = unproven and not self._messages.planner.fits_in_memory(share.counts)
        if self._buffers is not None:
            self._buffers.add_batch(samples if samples is not None else sample_count_or_one(batch))
        self._messages.load(batch)

    def begin_step(self, batch: Any) -> list[nn.Parameter] | None:
        """Count the batch and send the step's message; an optimizer's next closure goes on with the same step.

        Returns:
            None. If other parameters train than before, on all ranks: those that have been added to the module; the
            module has to be wrapped anew, and `wrapped_anew` called.

        Raises:
            RuntimeError: ranks differ in which parameters train.
        """
        if isinstance(batch, Iterator):
            raise TypeError(
                "training_step(dataloader_iter) fetches its batches by itself, so they can't be counted: take a batch"
            )
        if self._step is not None:
            return None
        if self._loaded is None:
            raise RuntimeError("training_step needs a batch that the Trainer has moved to the device")
        loaded, context = self._loaded, self._context
        self._trainable.look()
        count = LocalCount.of(context, batch, loaded)
        pending = self._messages.start(
            TRAINS,
            loaded.step,
            loss_count=count.on_host,
            plan_checksum=loaded.share.checksum if loaded.share is not None else 0,
            trainable=self._trainable.current.checksum,
            samples=1.0 if loaded.samples is None else loaded.samples,
        )
        self._step = step = Step(context, loaded, count, pending, accumulates=self._times.accumulates)
        if self._trainable.is_wrapped:
            self._prepare_parts(step)
            return None
        self._receive(step)  # all ranks have to know before they wrap the module: that is done together
        if self._times.accumulates and self._job.group.world_size > 1:
            # The next wrapper does not know which gradients the last one would have averaged at the window's end.
            with self._job.timer.waiting():
                call = "averaging before the module is wrapped anew"
                average_gradients(self._trainable.wrapped_or_current(), self._job.group, call)
        return self._trainable.take_new()

    def wrapped_anew(self, model: nn.Module) -> None:
        """The module was wrapped anew on all ranks."""
        self._recovery = self._recovery_for(model)
        self._trainable.set_wrapped()
        self._prepare_parts(self._running_step())

    def training_step(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's training step.

        Args:
            compute: runs it as plain DDP does.
            *args: its positional arguments, the batch first.
            **kwargs: its keyword arguments.
        """
        step, logging = self._running_step(), self._run.metrics.training_results
        logging.begin_step(borrowed=self.borrowed, empty=step.count.is_zero, count=step.count.on_device)
        # A rank that has asked to stop is answered in the backward pass, so it may not wait here.
        if self.borrowed and not self._run.early_stop.wanted and step.knows_nobody_has_samples():
            self._receive(step)
            return SKIPPED if self._module.automatic_optimization else None
        output: Any = None
        try:
            with self._explained(step), self._nothing.handled(step, args[0], partial(self._receive, step)):
                if self._in_parts is not None:
                    output = self._in_parts.training_step(logging, *args, **kwargs)
                else:
                    output = compute(*args, **kwargs)
        finally:
            logging.end_step(loss_of(output) if not step.count.is_zero else None)
        return output

    def backward(self, compute: Callable[[Tensor], Tensor], loss: Tensor, *, averaged: bool) -> Tensor:
        """A backward pass.

        Args:
            compute: goes backward from the weighted loss, as plain DDP does.
            loss: the user's loss.
            averaged: whether the pass waits for the other ranks, to average gradients.

        Raises:
            ValueError: no parameter trains.
        """
        step, parts = self._running_step(), self._in_parts
        self._receive(step)
        if not loss.requires_grad:
            check_trainable(self._module)
        keeps_gradients = not self._module.automatic_optimization
        bypassed: list[nn.Parameter] = []
        # In manual optimization parameters are also made to pause within a step, as by `toggle_optimizer`.
        if parts is None and self._trainable.has_changed(may_pause=keeps_gradients):
            bypassed, averaged = bypass(self._recovery.model, self._trainable, self._context, step.loaded.step), False
        with (
            self._explained(step),
            step.weighted(loss, averaged=averaged and parts is None, keeps_gradients=keeps_gradients) as weighted,
        ):
            if parts is not None:
                return self._backward_in_parts(parts, weighted, loss, step if averaged else None)
            output = compute(weighted)
            if bypassed:
                step.average_after_backward(bypassed)
            return output

    def global_loss(self, closure: Callable[[], Any], reduce: Callable[[Tensor], Any]) -> Callable[[], Any]:
        """A closure that returns the loss of the global batch, for optimizers that make decisions by it (LBFGS).

        Args:
            closure: computes the loss of this rank, and its gradients.
            reduce: the mean over all ranks.
        """

        def computed() -> Any:
            loss = closure()
            if not isinstance(loss, Tensor):
                return loss
            step = self._running_step()
            self._receive(step)
            return reduce(step.part_of_global_loss(loss))

        return computed

    def end_batch(self) -> None:
        """A training step is over, and the hooks at its end follow."""
        step, job = self._running_step(), self._job
        stepped = not (self._module.automatic_optimization and self._run.trainer.fit_loop._should_accumulate())
        self._receive(step)  # a module in manual optimization may not have gone backward
        bounds = self._in_parts.memory_bounds if self._in_parts is not None else None
        self._memory.end(step.loaded.samples or 0, bounds)
        self._times.add(
            job.timer.stop(),
            step.loaded.share if step.loaded.is_whole else None,
            self._messages.planner.global_batch or 0,  # 0 where the user shards the data
            stepped=stepped,
            in_parts=bounds is not None,
            averaged_after_backward=self._in_parts is not None,
        )
        step.loaded.undo_borrowed()
        if not step.samples.all() and step.samples.any():
            source = int(step.samples.argmax())
            follow_steps(self._module, source, job.group, job.device, job.timer.waiting, follows=self.borrowed)
        self._run.metrics.end_batch(step.logged_weight)
        self._messages.reporter.end_batch(step.loaded.step, stepped=stepped)
        self._loaded = self._step = self._in_parts = None

    def end_epoch(self) -> None:
        """This rank has no more batches in this epoch; nor may any other rank.

        Raises:
            RuntimeError: another rank has more.
        """
        self._context.zero_counts.end_epoch()
        message = StepMessage(
            LEFT_EPOCH,
            self._job.batches.next_step(),
            stop_requested=self._run.stop.requested,
            should_stop=self._run.early_stop.wanted,
        )
        messages = PendingMessages(self._job.group, message).receive()
        messages.check()
        self._messages.stop_if_requested(messages)
        self._run.metrics.exchange_epoch()
        self.pause()

    def pause(self) -> None:
        """The time until the next batch is fetched belongs to no step: validation, a checkpoint."""
        self._messages.reporter.pause()

    def end(self) -> None:
        """Training is over, on all ranks."""
        self._messages.end()

    def close(self) -> None:
        """Stop monitoring, also after an error."""
        self._job.group.waits.stop_watching()

    def receive(self) -> None:
        """Receive the messages of a step that is running, before another exchange begins."""
        if self._step is not None:
            self._receive(self._step)

    # ---- within a step ----

    def _backward_in_parts(self, parts: StepInParts, weighted: Tensor, loss: Tensor, averaged: Step | None) -> Tensor:
        """A backward pass that bypasses DDP's wrapper, with what the precision plugin does before and after."""
        precision = self._run.trainer.precision_plugin
        scaled = precision.pre_backward(weighted, self._module)
        average = averaged.average_after_backward if averaged is not None else None
        parts.backward(scaled, weighted, loss, average=average)
        return precision.post_backward(scaled, self._module)

    def _prepare_parts(self, step: Step) -> None:
        """Let the step be computed in parts, if memory may run out in it."""
        if self._risky and self._recovery.can_recover():
            too_large = self._memory.is_too_large(step.loaded.samples or 0)
            partial = PartialStep(
                local_batch=step.loaded.samples,
                weight=lambda: self._weight(step),
                count=lambda: float(step.count.value),
                count_of=lambda part, samples: float(self._context.counter(self._module, part, samples)),
            )
            self._in_parts = StepInParts(self._recovery, partial, too_large=too_large)

    def _weight(self, step: Step) -> float | Tensor:
        self._receive(step)
        return step.weight

    def _explained(self, step: Step) -> AbstractContextManager[None]:
        """Inside, an out-of-memory error says where it happened, why it ends the run, and what to do."""
        return self._recovery.explained(step.loaded.samples, risky=self._risky)

    def _running_step(self) -> Step:
        if self._step is None:
            raise RuntimeError("there is no training step to go backward in: call manual_backward in training_step")
        return self._step

    def _receive(self, step: Step) -> None:
        """Wait for the messages of a step, the first time; afterwards its weight is known."""
        messages = step.receive()
        if messages is not None:
            self._trainable.check(messages.column("trainable").tolist(), messages.step)
            self._messages.update(messages)
