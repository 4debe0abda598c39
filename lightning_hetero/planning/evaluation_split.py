"""How the samples of an evaluation are split: into steps that all ranks take, and each step over the ranks.

All ranks take the same number of steps, so that what a user's code exchanges while a batch is evaluated finds all of
them at the same place.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

from lightning_hetero.planning.allocation import allocate
from lightning_hetero.planning.measurements import RankMeasurements
from lightning_hetero.planning.step_time import StepTimeModel

BatchTimes = Mapping[Hashable, Sequence[tuple[int, float]]]
"""Local batch and seconds of each batch, by what was evaluated."""


def step_sizes(batches: Sequence[int], world_size: int, *, equal: bool) -> tuple[int, ...]:
    """Samples of all ranks in each step of an evaluation, from those in each of the loader's own batches.

    A step takes the next W batches. Each has at least W samples as long as there are so many in all, so that every rank
    has one: where the last ones would have fewer, they take some of the step before, or become a part of it.

    Args:
        batches: samples in each of the loader's batches.
        world_size: W.
        equal: whether samples may be moved between all steps, to make these equally large, give or take one. A mean
            over a rank's batches is then a mean over its samples.
    """
    steps = full_steps(batches, world_size)
    total = sum(steps)
    if equal and total:
        number = max(1, min(len(steps), total // world_size))
        size, larger = divmod(total, number)
        return (size + 1,) * larger + (size,) * (number - larger)
    while len(steps) > 1 and steps[-1] < world_size:
        missing = world_size - steps[-1]
        if steps[-2] - missing >= world_size:
            steps[-2:] = steps[-2] - missing, world_size
        else:
            steps[-2:] = [steps[-2] + steps[-1]]
    return tuple(steps)


def full_steps(batches: Sequence[int], world_size: int) -> list[int]:
    """The same, where no sample may move to another step: the last step may have fewer samples than ranks."""
    return [sum(batches[first : first + world_size]) for first in range(0, len(batches), world_size)]


def split_step(size: int, models: Sequence[StepTimeModel]) -> tuple[int, ...]:
    """How many of a step's samples each of W ranks evaluates, so that the last one is done as early as possible.

    Each rank gets at least one; of fewer samples than ranks, the fastest ranks get one each, and the others none.

    Args:
        size: samples in the step.
        models: seconds that each rank takes for a local batch.
    """
    ranks = range(len(models))
    if size < len(models):
        fastest = sorted(ranks, key=lambda rank: models[rank].seconds(1))[:size]
        return tuple(int(rank in fastest) for rank in ranks)
    return allocate(models, size, minimum=1)


class EvaluationTimes:
    """How long all ranks' evaluation batches took, by what was evaluated; ignored if not adaptive (fixed shares)."""

    def __init__(self, world_size: int, *, adaptive: bool = True) -> None:
        self._adaptive = adaptive
        self._histories: dict[Hashable, list[RankMeasurements]] = defaultdict(
            lambda: [RankMeasurements() for _ in range(world_size)]
        )

    def update(self, ranks: Sequence[BatchTimes]) -> None:
        """Record what W ranks have measured in a finished evaluation."""
        for rank, measured in enumerate(ranks if self._adaptive else ()):
            for key, batches in measured.items():
                for local_batch, seconds in batches:
                    self._histories[key][rank].observe(local_batch, seconds)

    def models(self, key: Hashable, local_batch: int, proportions: Sequence[float]) -> tuple[StepTimeModel, ...]:
        """W models of the seconds that a batch takes on each rank; only their ratios matter.

        Speeds of ranks that were not measured for this key follow from `proportions`, relative to those that were at
        `local_batch` samples.
        """
        assumed = tuple(1 / max(share, 1e-9) for share in proportions)  # seconds per sample
        histories = self._histories.get(key, [RankMeasurements() for _ in assumed])
        known = [history.model() if history.seconds else None for history in histories]
        scales = [m.seconds(local_batch) / s for m, s in zip(known, assumed, strict=True) if m is not None]
        scale = sum(scales) / len(scales) / local_batch if scales else 1.0
        return tuple(
            StepTimeModel((0, 1), (0.0, seconds * scale), seconds * scale) if model is None else model
            for model, seconds in zip(known, assumed, strict=True)
        )
