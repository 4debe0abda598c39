"""Validation, test and prediction: every rank evaluates its part by itself, and ranks meet at the end only."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from typing_extensions import override

from lightning_hetero.device.step_timer import DeviceClock, device_clock
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.evaluation_split import EvaluationTimes, Measured
from lightning_hetero.planning.planner import Planner, Shares, learns
from lightning_hetero.sampling.eval_sampler import Scope
from lightning_hetero.trainer.communicating import Communicating


@dataclass
class _Pass:
    """A rank's part of a loader while it is evaluated.

    Args:
        key: what is evaluated.
        sizes: samples in each of the rank's batches.
        marks: the begin, and the end of each batch.
    """

    key: tuple[str, int]
    sizes: Sequence[int]
    marks: list[Any] = field(default_factory=list)


class Evaluation:
    """What a Trainer's evaluations take, and what follows for the next one.

    Args:
        exchange: between the ranks.
        marks: points in time on the rank's device.
        times: what is known of all ranks.
        proportions: what the ranks do in training, W numbers; until evaluations have told.
    """

    def __init__(
        self,
        exchange: RankGroup,
        marks: DeviceClock,
        times: EvaluationTimes,
        proportions: Callable[[], Sequence[float]],
    ) -> None:
        self._exchange = exchange
        self._marks = marks
        self._times = times
        self._proportions = proportions
        self._passes: list[_Pass] = []

    def seconds(self, mode: RunningStage, scope: Scope, batch: int) -> tuple[float, ...]:
        """What a batch of the loader takes on each rank; W numbers, of which only the ratios matter."""
        return self._times.seconds((mode.dataloader_prefix or "", scope.number), batch, self._proportions())

    def begin(self, mode: RunningStage, scope: Scope, sizes: Sequence[int]) -> None:
        """This rank begins with a loader."""
        new = _Pass((mode.dataloader_prefix or "", scope.number), sizes, [self._marks.mark()])
        if self._passes and len(self._passes[-1].marks) == 1:
            self._passes.pop()  # it was looked at only, or goes side by side with this one
        self._passes.append(new)

    def step_over(self) -> None:
        """This rank has evaluated a batch."""
        if self._passes:
            self._passes[-1].marks.append(self._marks.mark())

    def end(self, *, learn: bool = True) -> None:
        """The evaluation is over, on all ranks.

        Args:
            learn: whether it is typical; a sanity check is not.
        """
        passes, self._passes = self._passes, []
        if not learn or self._exchange.world_size == 1:
            return
        measured: dict[Hashable, list[tuple[int, float]]] = {}
        for one in passes:
            points = [mark for mark in one.marks if self._marks.known(mark)]  # the host does not wait for the device
            for size, start, end in zip(one.sizes, points, points[1:], strict=False):
                seconds = self._marks.seconds(start, end)
                if seconds > 0:
                    measured.setdefault(one.key, []).append((size, seconds))
        told: Measured = measured
        self._times.update(self._exchange.gather(told))


class Evaluating(Communicating):
    """DDP whose evaluation steps are each rank's own: past DDP's wrapper, and without exchanges.

    Ranks evaluate different numbers of batches, so whoever exchanges in a step waits for a rank that may never come.
    """

    def __init__(self, **ddp_options: Any) -> None:
        super().__init__(**ddp_options)
        self._evaluation: Evaluation | None = None
        self._apart = ""  # the evaluation step that this rank is in

    def _evaluations(self, exchange: RankGroup, shares: Shares, planner: Callable[[], Planner | None]) -> Evaluation:
        """What all runs of this strategy evaluate with."""
        if self._evaluation is None:
            given = [1.0] * self.world_size if isinstance(shares, str) else [float(share) for share in shares]

            def proportions() -> Sequence[float]:
                now = planner() if learns(shares) else None
                return now.schedule.newest.local_batches if now is not None else given

            times = EvaluationTimes(self.world_size, learns=learns(shares))
            self._evaluation = Evaluation(exchange, device_clock(self.root_device), times, proportions)
        return self._evaluation

    def _in_evaluation_batch(self) -> bool:
        return bool(self._apart)

    @contextmanager
    def _by_itself(self, step: str) -> Iterator[None]:
        self._apart = step
        try:
            yield
        finally:
            self._apart = ""
        if self._evaluation is not None:
            self._evaluation.step_over()

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._by_itself("validation_step"), self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._by_itself("test_step"), self.precision_plugin.test_step_context():
            return self.lightning_module.test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self._by_itself("predict_step"), self.precision_plugin.predict_step_context():
            return self.lightning_module.predict_step(*args, **kwargs)

    # ---- before and after ----

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._evaluated()

    @override
    def on_test_end(self) -> None:
        super().on_test_end()
        self._evaluated()

    @override
    def on_predict_end(self) -> None:
        super().on_predict_end()
        self._evaluated()

    def _evaluated(self) -> None:
        if self._evaluation is not None and self.lightning_module is not None:
            self._evaluation.end(learn=not self.lightning_module.trainer.sanity_checking)

    # ---- exchanges, which no evaluation step can have ----

    def _refuse(self, what: str) -> None:
        if self._apart and self.world_size > 1:
            raise RuntimeError(
                f"rank {self.global_rank} ({self.root_device}) calls {what} in {self._apart}, but ranks evaluate "
                "different numbers of batches, so the others may never join: exchange at the end, such as in "
                f"on_{self._apart.removesuffix('_step')}_epoch_end, or let self.log do it"
            )

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self._apart:  # what is logged on step level with `sync_dist` stays this rank's own
            return tensor
        return super().reduce(tensor, group, reduce_op)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("barrier")
        super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._refuse("broadcast")
        return super().broadcast(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self._refuse("all_gather")
        return super().all_gather(tensor, group, sync_grads)
