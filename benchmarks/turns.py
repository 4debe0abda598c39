"""Ranks that are held to their quotas, and sides that take turns on them while nobody else uses the cores."""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from figures import Split, best_of, compute_times, middle, show_split, steady
from quotas import Hierarchy, Quotas, idle_seconds, place
from reports import say
from searching import Search

DISTURBED = 0.05
"""A turn is taken again when others took this part of one of the cores."""

_LOOK = 0.3  # seconds


class Stage:
    """Where sides take turns.

    Args:
        options: see `command_line.add_common`.
        quotas: in force.
        cores: W numbers.
        stack: closes the sides.
    """

    def __init__(self, options: argparse.Namespace, quotas: Quotas, cores: Sequence[int], stack: ExitStack) -> None:
        self._options = options
        self._cores = cores
        self._stack = stack
        self._patience = options.patience
        self.quotas = quotas
        self.disturbances: list[float] = []
        """The part of a core that others took, for each turn that counts."""

    def side(
        self,
        kind: str,
        ranks: Sequence[int] | None = None,
        allocator: str | None = None,
        evaluation: Any = None,
        global_batch: int | None = None,
        **setting: Any,
    ) -> Any:
        """A side of this comparison, on all ranks, with the options' allocator and global batch if none are given.

        With an `evaluation` (`tasks.Evaluation`) it evaluates instead of training, and a step is a whole evaluation.
        What else there is of a `sides.Setting` may be given too.
        """
        from sides import Setting, Side
        from tasks import Task

        options = self._options
        task = Task(options.model, options.size, global_batch or options.global_batch, evaluation)
        ranks = range(len(self._cores)) if ranks is None else ranks
        given = Setting(allocator or options.allocator, **setting)
        side = Side(kind, ranks, self._cores, task, self.quotas, given)
        return self._stack.enter_context(side)

    def take(self, side: Any, steps: int, split: Split | None = None, *, warm_up: int | None = None) -> list[float]:
        """Step times of one side's turn, of the quietest of several where others were using the cores."""
        warm_up = self._options.warm_up if warm_up is None else warm_up
        attempts: list[tuple[float, list[float]]] = []
        while not attempts or (min(attempts)[0] > DISTURBED and self._patience > 0):
            began = time.monotonic()
            self._wait_for_quiet()
            result = side.train(warm_up + steps, split)
            if attempts:
                self._patience -= time.monotonic() - began
            attempts.append((result["foreign"], steady(result["seconds"], warm_up)))
        taken, times = min(attempts)
        self.disturbances.append(taken)
        return times

    def once(
        self,
        side: Any,
        steps: int,
        split: Split | None = None,
        *,
        mark: int | None = None,
        on_mark: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """A turn that can't be repeated, such as a side's first steps; nothing is left out."""
        self._wait_for_quiet()
        result = side.train(steps, split, mark=mark, on_mark=on_mark)
        self.disturbances.append(result["foreign"])
        return result

    def _wait_for_quiet(self) -> None:
        """Let others finish, while there is patience left."""
        while self._patience > 0:
            began, idle = time.monotonic(), idle_seconds()
            time.sleep(_LOOK)
            elapsed, now = time.monotonic() - began, idle_seconds()
            least = min(now[core] - idle[core] for core in self._cores)
            competition = max(self.quotas.taken.values(), default=0.0)
            if least >= elapsed * (1 - DISTURBED - competition):
                return
            self._patience -= elapsed

    def search(self, fixed: Any, steps: int) -> Search:
        """A search for the best split by turns of a "fixed" side, with at most so many steps each."""

        def measure(split: Split, number: int, goes_on: bool) -> list[float]:
            times = self.take(fixed, number, split, warm_up=1)
            compute = ", ".join(f"{seconds * 1000:.0f}" for seconds in compute_times(fixed.steps, split))
            say(
                f"split {show_split(split)}: {median(times) * 1000:.0f} ms (compute time {compute}){' again' * goes_on}"
            )
            return times

        return Search(measure, steps)

    def contest(self, fixed: Any, splits: Sequence[Split], rounds: int, steps: int) -> dict[Split, list[list[float]]]:
        """Step times of splits that take turns: those of each round."""
        times: dict[Split, list[list[float]]] = {split: [] for split in splits}
        for number in range(rounds):
            shift = number % len(splits)
            for split in [*splits[shift:], *splits[:shift]]:
                times[split].append(self.take(fixed, steps, split))
        for split in splits:
            say(f"split {show_split(split)} in turns: {middle(times[split]) * 1000:.0f} ms")
        return times

    def disturbance(self) -> dict[str, float]:
        """For the report."""
        return {"median": median(self.disturbances), "greatest": max(self.disturbances)}


def judge(
    stage: Stage, fixed: Any, search: Search, more: Sequence[Split], rounds: int, steps: int, finalists: int = 3
) -> tuple[Split, dict[Split, float]]:
    """Which fixed split is the best, and what the step of each takes.

    The finalists of a search and `more` splits take turns. The best is the least of several noisy times here, so it is
    a bit too good: a strict judge of a run that is compared with it.

    Returns:
        the best, and the seconds of all that were measured.
    """
    for split in dict.fromkeys(more):
        search.look_at(split)
    hopeful = [split for split in dict.fromkeys(more) if not search.hopeless(split)]
    times = stage.contest(fixed, list(dict.fromkeys([*search.finalists(finalists), *hopeful])), rounds, steps)
    seconds = {split: middle(at) for split, at in times.items()}
    best = best_of(times)
    # What was only searched is as old as the search: scale it to the best split's time now.
    scale = seconds[best] / search.seconds[best]
    searched = {split: max(time * scale, seconds[best]) for split, time in search.seconds.items()}
    return best, searched | seconds


@contextmanager
def stage(options: argparse.Namespace, at_most: Sequence[int] | None = None) -> Iterator[Stage]:
    """A stage; whatever happens, its processes and control groups are gone afterwards.

    Args:
        options: see `command_line.add_common`.
        at_most: the largest quota that each rank will ever have, where they change.

    Raises:
        ValueError: the quotas do not fit on the cores of this machine.
    """
    cores = place(at_most or options.quotas, sorted(os.sched_getaffinity(0)))
    hierarchy = None if options.no_groups else Hierarchy.find()
    with Quotas(options.quotas, cores, hierarchy) as quotas, ExitStack() as stack:
        say(f"quotas {options.quotas} on cores {cores}: {quotas.means}; allocator: {options.allocator}")
        yield Stage(options, quotas, cores, stack)
