"""One training step of a rank, from its batch to the weight of its loss."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.device.memory import PeakMemory
from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.exchange.failures import BackwardWatch, check_backward
from lightning_hetero.exchange.groups import PendingRows, RankGroup
from lightning_hetero.exchange.messages import FETCHES, LEFT_EPOCH, TRAINS, Rows, StepMessage, check, column, weight
from lightning_hetero.sampling.random_state import RandomState
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.accumulation import AccumulationWindow
from lightning_hetero.step.gradients import average_gradients, gradients_left_alone, gradients_without_nan
from lightning_hetero.step.loss_count import LossCounter
from lightning_hetero.step.snapshot import ModuleSnapshot
from lightning_hetero.step.sync_batch_norm import BatchNormGroup
from lightning_hetero.step.zero_count import ZeroCountWarning


class Logging(Protocol):
    """What a step tells the room that handles `self.log`; see `metrics.StepLogging`."""

    def begin(self, *, borrowed: bool, empty: bool, samples: int | None, count: Tensor | None) -> None:
        """The module's training step begins; with `count`, only the device knows whether the batch is empty."""

    def end(self, loss: Tensor | None) -> None:
        """It has returned its loss."""


class TrainingSteps:
    """The training steps of one rank.

    A step's batch arrives (`arrive`), is counted and announced (`begin`), is weighted when its backward pass begins
    (`weigh`), and ends (`end`). Borrowed batches are undone at their end.

    Args:
        module: the LightningModule.
        counter: its loss counts.
        exchange: for the messages.
        device: of this rank.
        clock: runs while this rank works.
        watch: is told when it goes backward.
        on_rows: called once a step with all ranks' messages.
        batch_norm_group: of the synchronised layers, where there are any.
    """

    REMEMBERED = 16
    """Windows that wait for their device; it is never that far behind the host."""

    def __init__(
        self,
        module: nn.Module,
        counter: LossCounter,
        exchange: RankGroup,
        device: torch.device,
        clock: ComputeTimer,
        watch: BackwardWatch,
        on_rows: Callable[[int, Rows], None],
        batch_norm_group: BatchNormGroup | None = None,
    ) -> None:
        self._ties = batch_norm_group
        self._on_device = device.type == "cuda"
        self._module = module
        self._counter = counter
        self._exchange = exchange
        self._device = device
        self._clock = clock
        self._watch = watch
        self._on_rows = on_rows
        self._nothing = ZeroCountWarning(counter.rule, exchange.rank)
        self._share: Share | None = None
        self._random: RandomState | None = None
        self._state: ModuleSnapshot | None = None
        self._step = -1
        self._begun = False
        self._empty = False
        self._pending: PendingRows | None = None
        self._fault: Exception | None = None
        self._device_counts: tuple[Tensor, Tensor, dist.Work | None] | None = None
        self._hidden: Tensor | None = None
        self._weight: float | Tensor = 1.0
        self.loss_weight: float | Tensor | None = None
        """What the rank's loss weighs in the step's, in samples of the global batch; None: as much as its samples."""
        self.mask: Tensor | None = None
        """False on the device when nothing counts of the batch that is being gone backward from; None for no mask."""
        self._window = AccumulationWindow()
        self._memory = PeakMemory(device)
        self._largest = (0,) * exchange.world_size  # local batches that ranks have told to have computed in one piece
        self._held, self._peak = 0, 0.0
        self._fits, self._fails = 0, 0  # where memory has run out: local batches, or parts of them
        self._cut = False
        self.fits_in_memory: Callable[[Sequence[int]], bool] = lambda _: False
        """Whether it is known, on all ranks alike, that W local batches fit though they are larger than any before."""
        self.samples: int | None = None
        """Samples that went into the batch, or into the part of it, that is being counted; None where not known."""
        self.risky = False
        """A rank has more samples in this step than it is known to be able to compute; the same on all ranks."""
        self._count: float | Tensor = 0.0
        self._earlier = 0  # micro-batches of this optimizer step that are done
        self._finished: deque[AccumulationWindow] = deque(maxlen=self.REMEMBERED)

    @property
    def borrowed(self) -> bool:
        """Whether this rank computes other ranks' samples in this step."""
        return self._share is not None and self._share.borrowed

    @property
    def local_batch(self) -> int | None:
        """This rank's samples in this step, 0 if they are borrowed; None where the user shards."""
        return self._share.counts[self._exchange.rank] if self._share is not None else None

    @property
    def too_large(self) -> bool:
        """Whether memory ran out with as many samples as this rank has in this step, or with fewer."""
        return 0 < self._fails <= (self.local_batch or 0)

    @property
    def count(self) -> float:
        """What this rank's batch counts for; the host waits for the device."""
        return float(self._count)

    def count_of(self, part: Any, samples: int) -> float:
        """What a part of the batch counts for; the host waits for the device.

        Args:
            part: as `training_step` gets it.
            samples: in it.
        """
        self.samples = samples
        return float(self._counter(self._module, part))

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """The mean of the gradients over all ranks, after backward passes that each made by itself."""
        self._window.apart = True
        self._clock.gradients_ready()  # it runs again when the backward pass is over
        self._watch.enter(self._step)
        try:
            average_gradients(parameters, self._exchange)
        finally:
            self._watch.leave()

    def computed_in_parts(self, fits: int, fails: int | None) -> None:
        """This rank has computed its batch in parts.

        Args:
            fits: samples of the largest part.
            fails: the fewest samples with which memory ran out; None where it did not, since they were too many by what
                was known already, which then says as much as before.
        """
        self._cut = True
        if not self.local_batch or fails is None:  # borrowed samples are no measure
            return
        known = self._largest[self._exchange.rank]  # in one piece
        self._fits = min(self._fits or fits, fits) if known >= self.local_batch else max(self._fits, fits, known)
        self._fails = max(min(self._fails or fails, fails), self._fits + 1)

    def arrive(self, share: Share | None) -> None:
        """The batch of a step has been loaded; nothing of the user's code has seen it yet."""
        self._share = share
        self.samples = self.local_batch or None
        self._begun = self._cut = False
        larger = share is not None and any(map(int.__gt__, share.counts, self._largest))
        self.risky = share is not None and larger and not self.fits_in_memory(share.counts)
        self._weight = 1.0
        if self._ties is not None:
            self._ties.borrowed = self.borrowed
        self._memory.start(self.local_batch or 0)
        if share is not None and share.borrowed:
            self._random = share.random_state or RandomState.current()
            self._state = ModuleSnapshot(self._module)

    def begin(self, step: int, batch: Any, *, drawn: int, content: float, stop: bool) -> None:
        """Count the batch as `training_step` gets it, and send the message of the step.

        Closures that are called again change nothing. An error in counting is sent as a count that is none, so that
        all ranks hear of it; it is raised by `weigh`.
        """
        if self._begun:
            return
        self._begun = True
        self._step = step
        self._fault = None
        count: float | Tensor = 0.0
        if not self.borrowed:
            try:
                count = self._counter(self._module, batch)
            except Exception as error:  # noqa: BLE001 - whatever the user's rule raises has to reach the other ranks
                self._fault, count = error, float("nan")
        self._count = count
        # What the host does not know it does not ask for, since that would make it wait for the device.
        self._hidden = count if isinstance(count, Tensor) and self._on_device else None
        known = float(count) if self._hidden is None else 1.0
        self._empty = known == 0
        if self._on_device:
            self._add_up_on_device(count)
        self._pending = self._send(
            TRAINS,
            drawn,
            count=known,
            checksum=self._share.checksum if self._share is not None else 0,
            content=content,
            stop=stop,
        )

    def tell(self, step: int, *, drawn: int) -> None:
        """Tell what is known of the last steps before the batch of `step` is fetched, and hear of the others.

        Nothing is told between the micro-batches of an optimizer step.

        Raises:
            RuntimeError: see `weighting.check`.
        """
        if self._earlier:
            return
        self._step = step
        rows = self._receive(self._send(FETCHES, drawn))
        check(rows)
        self._pass_on(rows)

    def _send(self, kind: int, drawn: int, **more: float) -> PendingRows:
        news: dict[str, float] = {}
        if self._finished and self._finished[0].known():
            news = self._finished.popleft().measured()
        message = StepMessage(
            kind=kind,
            step=self._step,
            drawn=drawn,
            **news,
            **more,
            memory=self._peak,
            held=self._held,
            resting=self._memory.resting,
            fits=self._fits,
            fails=self._fails,
        )
        return self._exchange.start(message.row())

    def _receive(self, pending: PendingRows) -> Rows:
        return pending.wait(partial(check_backward, self._exchange.rank, self._exchange.world_size, self._step))

    def _pass_on(self, rows: Rows) -> None:
        self._largest = tuple(map(max, self._largest, column(rows, "held").astype(int).tolist()))
        self._on_rows(int(column(rows, "step")[0]), rows)

    def _add_up_on_device(self, count: float | Tensor) -> None:
        """On CUDA counts are added up on the device: reading them would make the host wait for it."""
        if isinstance(count, Tensor):
            own = count.to(self._device, torch.float64, non_blocking=True)
        else:
            own = torch.full((), count, dtype=torch.float64, device=self._device)
        total = own.clone()
        work = dist.all_reduce(total, async_op=True) if self._exchange.world_size > 1 else None
        self._device_counts = (own, total, work)

    def weigh(self) -> float | Tensor:
        """The weight of this rank's loss; waits for the other ranks' messages the first time in a step.

        Raises:
            RuntimeError, ValueError: see `weighting.check`; or what counting the batch raised on this rank.
        """
        if self._pending is None:
            return self._weight
        pending, self._pending = self._pending, None
        with self._clock.waiting():
            rows = self._receive(pending)
            if self._device_counts is not None and (work := self._device_counts[2]) is not None:
                work.wait()  # orders the streams, so that the device waits here; the host goes on
        if self._fault is not None:
            raise self._fault
        check(rows)
        if self._device_counts is not None:
            own, total, _ = self._device_counts
            self._device_counts = None
            self._nothing.look_on_device(total)
            self._weight = torch.where(total > 0, self._exchange.world_size * own / total, 0.0)
        else:
            self._nothing.look(self._step, float(column(rows, "count").sum()))
            self._weight = weight(column(rows, "count"), self._exchange.rank)
        self.loss_weight = self._count
        if self._share is not None:
            uniform = self._hidden is None and tuple(column(rows, "count").tolist()) == tuple(self._share.counts)
            self.loss_weight = None if uniform else self._weight * sum(self._share.counts) / self._exchange.world_size
        self._pass_on(rows)
        return self._weight

    @contextmanager
    def weighted(self, loss: Tensor, *, averaged: bool, masks_accumulate: bool) -> Iterator[Tensor]:
        """The loss to go backward from; gradients of a batch in which nothing counts are left alone meanwhile.

        Args:
            loss: the user's.
            averaged: the backward pass inside waits for those of the other ranks.
            masks_accumulate: gradients may hold those of earlier backward passes of the same step.
        """
        factor = self.weigh()
        if averaged:
            self._watch.enter(self._step)
        # Samples of which nothing counts take part in synchronised statistics: their gradients are not zero there.
        counts = not self._empty if self._hidden is None else self._hidden > 0
        tied = self._ties if self._ties is not None and not self.borrowed and counts is not True else None
        # A mask of buckets would wipe out the gradients of earlier micro-batches, which they hold too.
        masked = averaged and not masks_accumulate and self._earlier == 0
        if tied is None and isinstance(counts, Tensor) and masked:
            self.mask = counts
        try:
            with ExitStack() as hooks:
                if tied is not None:
                    hooks.enter_context(tied.gradients_count(counts))
                    hooks.enter_context(gradients_without_nan(self._module, counts))
                elif self._empty:
                    hooks.enter_context(gradients_left_alone(self._module))
                elif isinstance(counts, Tensor) and not masked:
                    hooks.enter_context(gradients_left_alone(self._module, unless=counts))
                if isinstance(factor, Tensor):
                    loss = loss * factor.to(loss.dtype)
                elif factor != 1.0 and not (self._empty and tied is None):  # there only its graph matters
                    loss = loss * factor
                yield loss
        finally:
            self.mask = None
            self._watch.leave()
            self._clock.backward_over()

    def global_loss(self, closure: Callable[[], Any], reduce: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        """A closure that returns the loss of the global batch, for optimizers that decide by it (LBFGS).

        Args:
            closure: computes the loss of this rank, and its gradients.
            reduce: the mean over all ranks.
        """

        def computed() -> Any:
            loss = closure()
            if not isinstance(loss, Tensor):
                return loss
            factor = self.weigh()
            part = loss.detach() * factor
            if self._hidden is not None:
                return reduce(torch.where(self._hidden > 0, part, torch.zeros_like(part)))
            return reduce(torch.zeros_like(part) if self._empty else part)

        return computed

    @contextmanager
    def logged(self, logging: Logging) -> Iterator[Callable[[Any], None]]:
        """The module's training step runs inside; give what it returned to the callable."""
        loss: Tensor | None = None

        def returned(output: Any) -> None:
            nonlocal loss
            value = output.get("loss") if isinstance(output, dict) else output
            loss = value if isinstance(value, Tensor) else None

        logging.begin(borrowed=self.borrowed, empty=self._empty, samples=self.local_batch, count=self._hidden)
        try:
            yield returned
        finally:
            logging.end(loss)

    def end(self, *, stepped: bool, global_batch: int | None) -> None:
        """The step is over.

        Args:
            stepped: the optimizer has made its step, or may have.
            global_batch: samples of a full step; None where the user shards.
        """
        self.weigh()  # a module in manual optimization may have had nothing to go backward from
        reading = self._clock.stop()
        self._held = 0 if self._cut else self.local_batch or 0
        if self._fits:
            self._fits = max(self._fits, self._held)
            self._fails = max(self._fails, self._fits + 1)
        self._peak = self._memory.of_step(self._held) if self._held else 0.0
        if self._cut:
            self._window.comparable = False
        if global_batch is not None:
            self._window.add(reading, self._share, global_batch)
        self._earlier = 0 if stepped else self._earlier + 1
        if stepped:
            if self._window.usable():
                self._finished.append(self._window)
            self._window = AccumulationWindow()
        if self._state is not None:
            self._state.restore()
        if self._random is not None:
            self._random.restore()
        self._state = self._random = self._share = None

    def leave_epoch(self, step: int) -> None:
        """Tell the others that this rank has no more batches in this epoch.

        Raises:
            RuntimeError: another rank has.
        """
        self._nothing.end_epoch()
        check(self._exchange.start(StepMessage(LEFT_EPOCH, step).row()).wait())
