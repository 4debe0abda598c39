"""Validation, test and prediction: how fast each rank evaluates, and where ranks must not exchange.

Every rank evaluates its part of a loader by itself, in any number of batches; ranks exchange before and after.
"""
# ruff: noqa: SLF001 - what is read of a Trainer's loops is guarded by `tests/test_private_names.py`

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage

from lightning_hetero.device.step_timer import DeviceClock
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.evaluation_split import BatchTimes, EvaluationTimes
from lightning_hetero.planning.shares import Shares
from lightning_hetero.sampling.eval_sampler import Scope
from lightning_hetero.trainer.planners import Planners

_TRANSFER_HOOKS = frozenset(
    {"batch_to_device", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"}
)


def batch_hook(module: "pl.LightningModule | None") -> str | None:
    """The hook of an evaluation batch that is running; None outside of one.

    Ranks evaluate different numbers of batches, so an exchange in such a hook may wait for a rank that never joins.
    """
    if module is None or module._trainer is None:
        return None
    stage, hook = module._trainer.state.stage, module._current_fx_name
    if stage is None or hook is None or not (stage.evaluating or stage == RunningStage.PREDICTING):
        return None
    is_of_a_batch = hook.endswith(("_step", "_batch_start", "_batch_end")) or hook in _TRANSFER_HOOKS
    return hook if is_of_a_batch else None


class UnmatchedExchangeError(RuntimeError):
    """One rank alone would exchange with the others; its cause is never another rank, so it has a type of its own."""


def exchange_error(call: str, hook: str, place: str) -> UnmatchedExchangeError:
    """The error where one rank alone would exchange with the others.

    Args:
        call: the name of the call, such as "all_gather".
        hook: the hook of an evaluation batch that makes it.
        place: rank and device.
    """
    stage = next((stage for stage in ("test", "predict") if stage in hook), "validation")
    return UnmatchedExchangeError(
        f"{place} calls {call} in {hook}, but ranks evaluate different numbers of batches, so the others may never "
        f"join: exchange at the end, such as in on_{stage}_epoch_end, or let self.log do it"
    )


class BroadcastCache:
    """Paths that rank 0 has broadcast to all ranks, for hooks in which ranks can't exchange.

    `Trainer.log_dir` is such a broadcast, needed to save images in any batch. It is None for a logger without a folder.
    """

    def __init__(self) -> None:
        self._results: dict[str | Path | None, Any] = {}
        self._is_recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is broadcast inside, and forget everything before."""
        self._results.clear()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def add(self, own: object, result: Any) -> None:
        """Keep the result of a broadcast, under the value that this rank passed to it."""
        if self._is_recording and isinstance(own, str | Path | None):
            self._results[own] = result

    def __contains__(self, own: object) -> bool:
        return isinstance(own, str | Path | None) and own in self._results

    def __getitem__(self, own: str | Path | None) -> Any:
        return self._results[own]


@dataclass
class _EvaluatedLoader:
    """A rank's part of a loader while it is evaluated.

    Args:
        key: what is evaluated: stage and loader.
        sizes: samples in each of the rank's batches.
        times: when the loader began, and when each batch ended, on the rank's device.
    """

    key: tuple[str, int]
    sizes: Sequence[int]
    times: list[Any] = field(default_factory=list)


class EvaluationBalancer:
    """Measures how long ranks take to evaluate, which decides how the next evaluation is split.

    Args:
        group: of all ranks.
        clock: of this rank's device.
        shares: those of the user.
        planners: has the plan of training, whose shares are used until evaluations have been measured.
    """

    def __init__(self, group: RankGroup, clock: DeviceClock, shares: Shares, planners: Planners) -> None:
        self._group = group
        self._clock = clock
        self._shares = shares
        self._planners = planners
        self._times = EvaluationTimes(group.world_size, adaptive=shares.adaptive)
        self._loaders: list[_EvaluatedLoader] = []

    def seconds(self, mode: RunningStage, scope: Scope, batch: int) -> tuple[float, ...]:
        """Seconds that a batch of the loader takes on each rank: W numbers, of which only the ratios matter."""
        training = self._planners.newest_split() if self._shares.adaptive else None
        proportions = training or self._shares.proportions_for(self._group.world_size)
        return self._times.seconds((mode.dataloader_prefix or "", scope.number), batch, proportions)

    def begin(self, mode: RunningStage, scope: Scope, sizes: Sequence[int]) -> None:
        """This rank begins with a loader."""
        key = (mode.dataloader_prefix or "", scope.number)
        self._loaders.append(_EvaluatedLoader(key, sizes, [self._clock.now()]))

    def end_batch(self) -> None:
        """This rank has evaluated a batch."""
        if self._loaders:
            self._loaders[-1].times.append(self._clock.now())

    def measured(self) -> BatchTimes:
        """What this rank has measured since the last call, by stage and loader."""
        loaders, self._loaders = self._loaders, []
        measured: dict[Hashable, list[tuple[int, float]]] = {}
        for loader in loaders:
            times = [time for time in loader.times if self._clock.has_passed(time)]  # the host does not wait
            for size, start, end in zip(loader.sizes, times, times[1:], strict=False):
                seconds = self._clock.seconds(start, end)
                if seconds > 0:
                    measured.setdefault(loader.key, []).append((size, seconds))
        return measured

    def update(self, measured: Sequence[BatchTimes]) -> None:
        """All ranks have reported what they have measured."""
        self._times.update(measured)
