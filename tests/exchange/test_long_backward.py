"""A long backward pass is published while it lasts, and never after it."""

import threading

import pytest
import torch.distributed as dist

from lightning_hetero.exchange.long_backward import LongBackwardMonitor

SECONDS = 10
"""The test's own deadline for what takes a moment."""


class Held:
    """A store that holds back the first value that is written until the test lets it go."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.begun, self.released = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        if not self.begun.is_set():
            self.begun.set()
            assert self.released.wait(SECONDS)
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def test_what_is_published_while_the_pass_ends_is_cleared() -> None:
    """Else another rank, a step later, would assume this one to be still in it, and end a healthy run."""
    store = Held()
    monitor = LongBackwardMonitor(0, 2, store, seconds=0.001)  # type: ignore[arg-type] # a stand-in
    monitor.enter(7)
    assert store.begun.wait(SECONDS), "the pass is being published"
    leaving = threading.Thread(target=monitor.leave)
    leaving.start()
    leaving.join(0.2)  # without waiting for the publication, it would be over by then
    store.released.set()
    leaving.join(SECONDS)
    monitor.stop()
    other = LongBackwardMonitor(1, 2, store)  # type: ignore[arg-type] # a stand-in
    other.check_others(8)
    other.stop()
    assert list(store.values.values()) == [""]


class Seen:
    """A HashStore that says when something was written."""

    def __init__(self) -> None:
        self.store, self.written = dist.HashStore(), threading.Event()

    def set(self, key: str, value: str) -> None:
        self.store.set(key, value)
        self.written.set()

    def check(self, keys: list[str]) -> bool:
        return self.store.check(keys)

    def get(self, key: str) -> bytes:
        return self.store.get(key)


def test_a_rank_that_has_skipped_a_backward_pass_is_detected() -> None:
    """At a later step; not at the same one, nor after the pass."""
    store = Seen()
    waits = LongBackwardMonitor(0, 3, store, seconds=0.001)  # type: ignore[arg-type] # a stand-in
    other = LongBackwardMonitor(2, 3, store)  # type: ignore[arg-type] # a stand-in
    other.check_others(3)
    waits.enter(3)
    assert store.written.wait(SECONDS)
    other.check_others(3)
    waits.check_others(4)  # it is the rank itself
    with pytest.raises(
        RuntimeError, match="rank 2 is at global batch 4 while rank 0 waits in the backward pass of glo"
    ):
        other.check_others(4)
    waits.leave()
    other.check_others(4)
    waits.enter(5)
    waits.stop()
    other.check_others(6)
    other.stop()


def test_one_rank_needs_no_store() -> None:
    monitor = LongBackwardMonitor(0, 1, None)
    monitor.enter(1)
    monitor.check_others(2)
    monitor.leave()
    monitor.stop()
