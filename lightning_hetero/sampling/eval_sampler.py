"""What one rank evaluates of a loader: its part of the stream, in batches no larger than the loader's own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import Sampler

from lightning_hetero.planning.evaluation_split import Piece, pieces_of, samples_of_ranks
from lightning_hetero.sampling.global_batches import GlobalBatches, Index


@dataclass(frozen=True)
class Scope:
    """How much of a loader an evaluation takes, and how its loaders go together.

    Args:
        number: of the loader, among all that are evaluated in turn; 0 where they go side by side.
        batches: how many of its batches Lightning takes (`limit_val_batches`, sanity check); None for all.
        steps: where loaders go side by side, how many steps all of them take together; a step is never cut then, so
            that what is paired in one process stays paired. None where loaders go one after the other.
        cycles: side by side, a loader that is shorter than that begins again.
    """

    number: int = 0
    batches: int | None = None
    steps: int | None = None
    cycles: bool = False


class EvaluationSampler(Sampler[list[Index]]):
    """The batch sampler of one rank in evaluation: its part of the stream, each sample on one rank only.

    Its length is the number of batches that one process would evaluate, on every rank, so that no rank leaves out what
    Lightning does before and after the batches. A rank draws fewer, or none at all.

    Args:
        stream: the loader's batches, as one process would draw them.
        rank: whose part.
        scope: what is evaluated of it; asked at the start of each pass.
        seconds: from the scope and the samples of a batch to what such a batch takes on each rank, W numbers.
        epoch: the trainer's epoch.
        on_begin: called with the scope and the samples of each of the rank's batches, when a pass begins.
    """

    def __init__(
        self,
        stream: GlobalBatches,
        rank: int,
        *,
        scope: Callable[["EvaluationSampler"], Scope],
        seconds: Callable[[Scope, int], Sequence[float]],
        epoch: Callable[[], int],
        on_begin: Callable[[Scope, Sequence[int]], None] = lambda _, __: None,
    ) -> None:
        self.stream = stream
        self._rank = rank
        self._scope = scope
        self._seconds = seconds
        self._epoch = epoch
        self._on_begin = on_begin
        self._drawn = False

    def _draw(self) -> list[list[Index]]:
        self.stream.draw(self._epoch(), 0)
        self._drawn = True
        return list(self.stream.batches(lambda: False))

    def __iter__(self) -> Iterator[list[Index]]:
        batches = self._draw()
        scope = self._scope(self)
        pieces = self._pieces([len(batch) for batch in batches[: scope.batches]], scope)
        self._on_begin(scope, [piece.last - piece.first for piece in pieces])
        return iter([list(batches[piece.batch][piece.first : piece.last]) for piece in pieces])

    def _pieces(self, sizes: Sequence[int], scope: Scope) -> list[Piece]:
        full = max(sizes, default=0)
        if not full:
            return []
        if scope.steps is None:
            return pieces_of(sizes, samples_of_ranks(sizes, self._seconds(scope, full)), self._rank)
        steps = [1] * scope.steps
        own = pieces_of(steps, samples_of_ranks(steps, self._seconds(scope, full), whole=True), self._rank)
        numbers = [step.batch % len(sizes) if scope.cycles else step.batch for step in own]
        return [Piece(number, 0, sizes[number]) for number in numbers if number < len(sizes)]

    def __len__(self) -> int:
        if not self._drawn:
            self._draw()
        return len(self.stream)
