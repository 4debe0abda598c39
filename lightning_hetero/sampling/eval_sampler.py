"""The part of a loader that one rank evaluates, in batches no larger than the loader's own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.utils.data import Sampler

from lightning_hetero.planning.evaluation_split import Piece, pieces_of, samples_of_ranks
from lightning_hetero.sampling.global_batches import GlobalBatches, Index


@dataclass(frozen=True)
class Scope:
    """How much of a loader is evaluated, and whether loaders are evaluated one after the other or side by side."""

    number: int = 0  # index of the loader, if evaluated one after the other; 0 side by side
    batches: int | None = None  # how many of its batches Lightning takes (`limit_val_batches`, sanity check); None: all
    steps: int | None = None
    """Side by side, the number of steps of all loaders together; a step is then never cut, so that batches paired in a
    single process stay paired. None if one after the other."""
    cycles: bool = False  # side by side, a loader with fewer batches than steps starts again


class EvaluationPasses(Protocol):
    """What a sampler needs to know about the evaluation that its passes belong to."""

    def epoch(self) -> int:
        """The trainer's epoch."""

    def scope(self, sampler: "EvaluationSampler") -> Scope:
        """How much of the sampler's loader is evaluated."""

    def seconds(self, scope: Scope, samples: int) -> Sequence[float]:
        """W seconds that a batch of `samples` samples takes on each rank; only their ratios matter."""

    def begin(self, scope: Scope, sizes: Sequence[int]) -> None:
        """Called when a pass begins, in which this rank evaluates batches of these sizes."""


class EvaluationSampler(Sampler[list[Index]]):
    """The batch sampler of one rank in evaluation: its part of the loader's batches, each sample on one rank only.

    On every rank its length is the number of batches that a single process would evaluate, so that no rank skips what
    Lightning does before and after the batches; a rank draws fewer, or none at all. `batches` are the loader's, as a
    single process would draw them.
    """

    def __init__(self, batches: GlobalBatches, rank: int, passes: EvaluationPasses) -> None:
        self._batches, self._rank, self._passes = batches, rank, passes
        self._drawn = False

    def _draw(self) -> None:
        self._batches.draw(self._passes.epoch(), 0)
        self._drawn = True

    def __iter__(self) -> Iterator[list[Index]]:
        self._draw()
        batches = list(self._batches.batches(lambda: False))
        scope = self._passes.scope(self)
        pieces = self._pieces([len(batch) for batch in batches[: scope.batches]], scope)
        self._passes.begin(scope, [piece.last - piece.first for piece in pieces])
        return iter([list(batches[piece.batch][piece.first : piece.last]) for piece in pieces])

    def _pieces(self, sizes: Sequence[int], scope: Scope) -> list[Piece]:
        full = max(sizes, default=0)
        if not full:
            return []
        if scope.steps is None:
            return pieces_of(sizes, samples_of_ranks(sizes, self._passes.seconds(scope, full)), self._rank)
        steps = [1] * scope.steps
        own = pieces_of(steps, samples_of_ranks(steps, self._passes.seconds(scope, full), whole=True), self._rank)
        numbers = [step.batch % len(sizes) if scope.cycles else step.batch for step in own]
        return [Piece(number, 0, sizes[number]) for number in numbers if number < len(sizes)]

    def __len__(self) -> int:
        if not self._drawn:
            self._draw()
        return len(self._batches)
