"""The part of a loader that one rank evaluates: in each step, its part of the samples that all ranks evaluate."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

from torch.utils.data import Sampler

from lightning_hetero.planning.evaluation_split import full_steps, step_sizes
from lightning_hetero.sampling.global_batches import GlobalBatches, Index
from lightning_hetero.sampling.train_sampler import local_indices


@dataclass(frozen=True)
class Scope:
    """How much of a loader is evaluated, and whether loaders are evaluated one after the other or side by side."""

    number: int = 0  # index of the loader, if evaluated one after the other; 0 side by side
    steps: int | None = None  # how many Lightning takes (`limit_val_batches`, sanity check); None: all
    side_by_side: bool = False


class EvaluationPasses(Protocol):
    """What a reader of a loader's samples needs to know about the evaluation that its passes belong to."""

    def scope(self, reader: Any) -> Scope:
        """How much of the reader's loader is evaluated."""

    def begin(self, scope: Scope, local_batches: Sequence[int]) -> None:
        """A pass begins, with the samples of this rank in each step, 0 where it borrows one; more may be added."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def epoch(self) -> int:
        """The trainer's epoch."""

    def splits(self, scope: Scope, sizes: Sequence[int]) -> Sequence[Sequence[int]]:
        """For each step of `sizes` samples, W numbers of samples."""


class EvaluationSampler(Sampler[list[Index]]):
    """The batch sampler of one rank in evaluation: its part of each step, each sample on one rank only.

    All ranks take the same number of steps. If there are fewer samples than ranks, a rank without one borrows
    another's.

    Args:
        batches: the loader's own, as a single process would draw them.
        rank: whose part is drawn.
        passes: the evaluation.
        equal: whether all steps may be made equally large, see `step_sizes`.
        fit_in_a_batch: whether these samples fit in one batch; asked, on all ranks together, where the last step would
            be larger than all others. Images of different sizes, in batches of one, don't.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        rank: int,
        passes: EvaluationPasses,
        *,
        equal: bool,
        fit_in_a_batch: Callable[[Sequence[Index]], bool],
    ) -> None:
        self._batches, self._rank, self._passes, self._equal = batches, rank, passes, equal
        self._fit_in_a_batch = fit_in_a_batch
        self._drawn = False

    def _draw(self) -> list[list[Index]]:
        self._batches.draw(self._passes.epoch(), 0)
        self._drawn = True
        return list(self._batches.batches(lambda: False))

    def _sizes(self, batches: Sequence[Sequence[Index]], scope: Scope) -> Sequence[int]:
        world_size, sizes = self._passes.world_size, [len(batch) for batch in batches]
        full = full_steps(sizes, world_size)
        steps: Sequence[int] = step_sizes(sizes, world_size, equal=self._equal and not scope.side_by_side)
        if len(steps) < len(full) and not self._fit_in_a_batch(list(chain.from_iterable(batches))[-steps[-1] :]):
            steps = full
        if scope.steps is not None and scope.steps < len(steps):  # a limited evaluation takes full steps
            steps = full[: scope.steps]
        return steps

    def __iter__(self) -> Iterator[list[Index]]:
        batches = self._draw()
        scope = self._passes.scope(self)
        sizes = self._sizes(batches, scope)
        splits = self._passes.splits(scope, sizes)
        indices = list(chain.from_iterable(batches))
        ends = pairwise((0, *accumulate(sizes)))
        self._passes.begin(scope, [counts[self._rank] for counts in splits])
        return iter(
            [
                local_indices(indices[first:last], counts, self._rank)
                for (first, last), counts in zip(ends, splits, strict=True)
            ]
        )

    def __len__(self) -> int:
        batches = list(self._batches.batches(lambda: False)) if self._drawn else self._draw()
        return len(self._sizes(batches, Scope()))
