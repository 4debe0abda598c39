"""Validation, test and prediction: how fast each rank evaluates, and so how the next evaluation is split."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.trainer.states import RunningStage

from lightning_hetero.device.step_timer import DeviceClock
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.evaluation_split import BatchTimes, EvaluationTimes
from lightning_hetero.planning.shares import Shares
from lightning_hetero.sampling.eval_sampler import Scope
from lightning_hetero.trainer.planner_cache import PlannerCache


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
        planner_cache: has the plan of training, whose shares are used until evaluations have been measured.
    """

    def __init__(self, group: RankGroup, clock: DeviceClock, shares: Shares, planner_cache: PlannerCache) -> None:
        self._group = group
        self._clock = clock
        self._shares = shares
        self._planner_cache = planner_cache
        self._times = EvaluationTimes(group.world_size, adaptive=shares.adaptive)
        self._loaders: list[_EvaluatedLoader] = []

    def seconds(self, mode: RunningStage, scope: Scope, batch: int) -> tuple[float, ...]:
        """Seconds that a batch of the loader takes on each rank: W numbers, of which only the ratios matter."""
        training = self._planner_cache.newest_split() if self._shares.adaptive else None
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
