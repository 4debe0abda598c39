"""Training data whose batches are the same on all ranks, and can't be cut: each rank takes every W-th of them."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from math import ceil
from typing import Any

import numpy as np

from lightning_hetero.exchange.duplicate_data import DuplicateDataCheck, content_hash
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.sampling.eval_sampler import EvaluationPasses
from lightning_hetero.sampling.position import EpochPasses, Position
from lightning_hetero.sampling.random_state import SeparateRandomState
from lightning_hetero.sampling.train_sampler import PendingShares, Share
from lightning_hetero.sampling.whole_batches import Turn, turns
from lightning_hetero.step.batch_contents import sample_count_or_one
from lightning_hetero.trainer.user_loader import USERS_LOADER, users_loader


def counted_off_sentence(subject: str, world_size: int) -> str:
    """Says once what happens; `subject` says what can't be cut."""
    return (
        f"hetero: {subject}, so its batches can't be cut, and they are the same on all ranks: each rank takes one of "
        f"every {world_size} batches, whatever its share"
    )


class _Stream:
    """The passes over an iterable, as `EpochPasses` begins them: each under random states that all ranks share."""

    endless = True  # a pass is not drawn before it is read

    def __init__(self, users: Any, rank: int, world_size: int, seed: int) -> None:
        self._users, self._rank, self._world_size, self._seed = users, rank, world_size, seed
        self._begun: tuple[int, int] | None = None  # the pass that was begun, but not read yet
        self._state = SeparateRandomState(seed)
        self.unread: Iterator[Any] = iter(())
        """The user's batches in the pass that has begun."""

    def draw(self, epoch: int, number: int) -> None:
        """Begin a pass, unless it was begun and not read yet."""
        if self._begun != (epoch, number):
            self._begun = (epoch, number)
            seeds = np.random.SeedSequence([self._seed, epoch, number])
            self._state = SeparateRandomState(int(seeds.generate_state(1)[0]))
            with self._state.active():
                self.unread = iter(self._users)

    def first(self, batches: int) -> list[Any]:
        """The first batches of the pass; they stay in it."""
        with self._state.active():
            first = list(islice(self.unread, batches))
        self.unread = chain(first, self.unread)
        return first

    def batches(self, _may_restart: Callable[[], bool]) -> Iterator[Turn]:
        """The turns of this rank in the pass."""
        self._begun = None
        taken = turns(self.unread, self._rank, self._world_size, sample_count_or_one)
        while True:
            with self._state.active():
                turn = next(taken, None)
            if turn is None:
                return
            yield turn

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


class _Wrapper:
    """Has the attributes of the user's iterable."""

    def __init__(self, users: Any) -> None:
        vars(self)[USERS_LOADER] = users_loader(users)
        self._users = users

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_users":
            raise AttributeError(name)
        return getattr(self._users, name)


class _Begun(_Wrapper):
    """An iterable whose first batches have been read: its first pass begins with these.

    Args:
        users: the user's iterable.
        first: its first pass.
    """

    def __init__(self, users: Any, first: Iterator[Any]) -> None:
        super().__init__(users)
        self._first: Iterator[Any] | None = first

    def __iter__(self) -> Iterator[Any]:
        first, self._first = self._first, None
        return iter(self._users) if first is None else first

    def __len__(self) -> int:
        return len(self._users)


class CountedOff(_Wrapper):
    """An iterable of batches as one rank trains on it: every W-th batch, and in the last step maybe a borrowed one.

    What it draws from torch's, numpy's or Python's global generators is the same on all ranks.

    Args:
        users: the user's iterable, or the loader of an iterable data set.
        group: of all ranks.
        seed: for all passes, shared by all ranks.
        position: of training.
        pending_shares: where the shares are recorded; None for new ones.
    """

    def __init__(
        self,
        users: Any,
        group: RankGroup,
        seed: int,
        position: Callable[[], Position],
        pending_shares: PendingShares | None = None,
    ) -> None:
        super().__init__(users)
        self._world_size = group.world_size
        self._stream = _Stream(users, group.rank, group.world_size, seed)
        self.passes = EpochPasses(self._stream, position)
        self.pending_shares = pending_shares or PendingShares(group.rank)

    def agrees(self, group: RankGroup) -> bool:
        """Whether the next pass begins with the same batches on all ranks; all ranks call it together.

        It does not if there are none, or if they contain nothing that can be compared.
        """
        self.passes.begin()
        hashes = [content_hash(batch) for batch in self._stream.first(DuplicateDataCheck.COMPARED_STEPS)]
        of_ranks = group.gather(hashes)
        return bool(hashes) and all(hashes) and all(others == hashes for others in of_ranks)

    def left_alone(self) -> _Begun:
        """The user's iterable where it is each rank's own; the pass that `agrees` has begun is its first one."""
        return _Begun(self._users, self._stream.unread)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets `_iterator` when it has shut workers down. Its `worker_init_fn` would seed them by rank.
        super().__setattr__(name, value)
        if name == "_iterator":
            self._users._iterator = value  # noqa: SLF001 - a DataLoader's, guarded by a test

    def __iter__(self) -> Iterator[Any]:
        first_step = self.passes.begin()  # now, as in `LocalBatchSampler`
        self.pending_shares.begin(first_step)
        return self._steps(first_step)

    def _steps(self, first_step: int) -> Iterator[Any]:
        for step, turn in self.passes.batches(first_step):
            self.pending_shares.add(Share(step, turn.counts, turn.borrowed, checksum=0, planned=False))
            yield turn.batch
        self.pending_shares.end()

    def __len__(self) -> int:
        """Number of steps; a TypeError if the iterable has no length."""
        return ceil(len(self._users) / self._world_size)


class EvaluatedWhole(CountedOff):
    """The same in evaluation; `evaluation` is what its passes belong to."""

    def __init__(
        self,
        users: Any,
        group: RankGroup,
        seed: int,
        position: Callable[[], Position],
        evaluation: EvaluationPasses,
    ) -> None:
        super().__init__(users, group, seed, position)
        self._rank, self._evaluation = group.rank, evaluation

    def _steps(self, first_step: int) -> Iterator[Any]:
        local_batches: list[int] = []
        self._evaluation.begin(self._evaluation.scope(self), local_batches)
        for _, turn in self.passes.batches(first_step):
            local_batches.append(0 if turn.borrowed else turn.counts[self._rank])
            yield turn.batch
