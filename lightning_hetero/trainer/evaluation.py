"""Validation, test and prediction: how fast each rank evaluates, and so how the next evaluation is split."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.device.step_timer import ComputeTimer, StepTiming
from lightning_hetero.planning.evaluation_split import BatchTimes, EvaluationTimes, split_step
from lightning_hetero.planning.shares import Shares
from lightning_hetero.sampling.eval_sampler import Scope
from lightning_hetero.trainer.planner_cache import PlannerCache

_BORROWS = (
    "borrows another's, so that all take part in what the module exchanges. What it computes then is left out of "
    "logged values, predictions and the module's metrics, but not of lists and of metrics held elsewhere"
)
"""The end of warnings."""


@dataclass
class _EvaluatedLoader:
    """A rank's part of a loader while it is evaluated.

    Args:
        key: what is evaluated: stage and loader.
        local_batches: this rank's samples in each step; 0 where it borrows one. It may grow.
        kept: how many of these its collate function has kept, of the batches loaded so far; empty if it keeps all.
        timings: of the steps so far.
        begun: steps so far.
        one_loader: False for several loaders side by side.
    """

    key: tuple[str, int]
    local_batches: Sequence[int]
    kept: list[int] = field(default_factory=list)
    timings: list[StepTiming | None] = field(default_factory=list)
    begun: int = 0
    one_loader: bool = True

    def samples(self, step: int) -> int:
        """This rank's samples in a step that has been loaded; 0 if it has none of its own."""
        return min(self.kept[step], self.local_batches[step]) if self.kept else self.local_batches[step]


class EvaluationBalancer:
    """Measures how long ranks take to evaluate, which decides how the next evaluation is split.

    Args:
        world_size: the number of ranks.
        timer: of this rank's compute time; training does not use it during an evaluation.
        shares: those of the user.
        planner_cache: has the plan of training, whose shares are used until evaluations have been measured.
    """

    def __init__(self, world_size: int, timer: ComputeTimer, shares: Shares, planner_cache: PlannerCache) -> None:
        self._world_size = world_size
        self._timer = timer
        self._shares = shares
        self._planner_cache = planner_cache
        self._times = EvaluationTimes(world_size, adaptive=shares.adaptive)
        self._loaders: list[_EvaluatedLoader] = []
        self._warned = False

    def splits(self, stage: RunningStage, scope: Scope, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """For each step of `sizes` samples, W numbers of samples; the same on all ranks."""
        if not sizes:
            return []
        training = self._planner_cache.newest_split() if self._shares.adaptive else None
        proportions = training or self._shares.proportions_for(self._world_size)
        usual = max(1, max(sizes) // self._world_size)
        models = self._times.models(_key(stage, scope), usual, proportions)
        splits = {size: split_step(size, models) for size in set(sizes)}
        if min(sizes) < self._world_size and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"a step of the {stage.dataloader_prefix} loader has fewer samples ({min(sizes)}) than there are ranks "
                f"({self._world_size}): a rank without one {_BORROWS}"
            )
        return [splits[size] for size in sizes]

    def begin(self, stage: RunningStage, scope: Scope, local_batches: Sequence[int]) -> None:
        """This rank begins with a loader; see `_EvaluatedLoader`."""
        if scope.side_by_side and self._loaders:
            if self._loaders[0].begun:  # a loader that is cycled
                return
            pairs = zip_longest(self._loaders.pop().local_batches, local_batches, fillvalue=0)
            local_batches = [max(pair) for pair in pairs]
        self._loaders.append(_EvaluatedLoader(_key(stage, scope), local_batches, one_loader=not scope.side_by_side))
        self._timer.start()

    def load(self, samples: int) -> None:
        """A batch was loaded of which the collate function has kept so many samples; of one that may leave some out."""
        if self._loaders and self._loaders[-1].one_loader:
            self._loaders[-1].kept.append(samples)

    def begin_batch(self) -> int | None:
        """A batch has been loaded; returns this rank's samples in it: 0 if they are borrowed, None if not known."""
        if not self._loaders or self._loaders[-1].begun >= len(self._loaders[-1].local_batches):
            return None
        loader = self._loaders[-1]
        loader.begun += 1
        samples = loader.samples(loader.begun - 1)
        if samples == 0 and not self._warned:
            self._warned = True
            warnings.warn(f"a rank has no samples of its own in a step of an evaluation, and {_BORROWS}", stacklevel=2)
        return samples

    def borrowed_batches(self) -> list[set[int]]:
        """The batches of each loader of this evaluation in which this rank has borrowed other ranks' samples."""
        loaders = [loader for loader in self._loaders if loader.begun]
        return [{step for step in range(loader.begun) if loader.samples(step) == 0} for loader in loaders]

    def end_batch(self) -> None:
        """This rank has evaluated a batch."""
        if self._loaders:
            self._loaders[-1].timings.append(self._timer.stop())
            self._timer.start()

    def measured(self) -> BatchTimes:
        """What this rank has measured since the last call, by stage and loader; the evaluation is over."""
        self._timer.stop()
        loaders, self._loaders = self._loaders, []
        measured: dict[Hashable, list[tuple[int, float]]] = {}
        for loader in loaders:
            for size, timing in zip(loader.local_batches, loader.timings, strict=False):
                # Left-out samples take time too. The host does not wait for what the device has not reached.
                if size and timing is not None and timing.has_passed() and (seconds := timing.compute_seconds()) > 0:
                    measured.setdefault(loader.key, []).append((size, seconds))
        return measured

    def update(self, measured: Sequence[BatchTimes]) -> None:
        """All ranks have reported what they have measured."""
        self._times.update(measured)


def _key(stage: RunningStage, scope: Scope) -> tuple[str, int]:
    return stage.dataloader_prefix or "", scope.number
