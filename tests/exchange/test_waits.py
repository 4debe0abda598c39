"""A long wait is published while it lasts, and looked into: it ends if it can't come to its end, and only then."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_hetero.exchange.calls import BACKWARD_PASS, OF_USER, Call, UnmatchedCallError
from lightning_hetero.exchange.waits import GaveUpError, LostConnectionError, Waits, WaitTimeoutError

SECONDS = 10
"""The test's own deadline for what takes a moment."""

PASS, MESSAGES = (
    Call("backward", "the backward pass of global batch 3", BACKWARD_PASS),
    Call("messages", "global batch 4"),
)
GATHER = Call("all_gather", "all_gather in training_step", OF_USER)


class Held:
    """A store that holds back the first wait that is published until the test lets it go."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.begun, self.released = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        if "/wait/" in key and not self.begun.is_set():
            self.begun.set()
            assert self.released.wait(SECONDS)
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def waits_of(rank: int, store: Any, world_size: int = 2, timeout: float = 900) -> Waits:
    """They look at once."""
    return Waits(rank, world_size, "cpu", store, timedelta(seconds=timeout), long=-1.0, interval=0.001)


def test_what_is_published_while_the_wait_ends_is_cleared() -> None:
    """Else another rank, a step later, would assume this one to be still in it, and end a healthy run."""
    store = Held()
    waits = waits_of(0, store)
    waits.watch()
    inside = waits.inside(PASS, "backward", waits.begin("backward"))
    inside.__enter__()
    assert store.begun.wait(SECONDS), "the wait is being published"
    leaving = threading.Thread(target=inside.__exit__, args=(None, None, None))
    leaving.start()
    leaving.join(0.2)  # without waiting for the publication, it would be over by then
    store.released.set()
    leaving.join(SECONDS)
    waits.stop_watching()
    assert store.values["lightning_hetero/wait/0"] == ""


def test_ranks_that_wait_for_each_other_are_told_so() -> None:
    """Rank 2 computes and has reached neither call: it may be waited for, but ends no wait of these two."""
    store = dist.HashStore()
    ranks = [waits_of(rank, store, 3) for rank in range(3)]
    first, second, _ = ranks
    with first.inside(PASS, "backward", first.begin("backward")):
        first.check()  # nobody else waits
        with second.inside(MESSAGES, "ranks", second.begin("ranks")):
            for waits in ranks[1::-1]:
                with pytest.raises(UnmatchedCallError) as caught:
                    waits.check()
                assert str(caught.value) == (
                    "the ranks went different ways: rank 0 (cpu) is in the backward pass of global batch 3, while "
                    "rank 1 (cpu) is in global batch 4: rank 1 (cpu) skipped a backward pass that the others made. "
                    "Make all ranks run the same backward passes."
                )
        second.begin("backward")  # it is late, not lost
        with second.inside(GATHER, "ranks", second.begin("ranks")):
            first.check()
            second.check()


def test_a_rank_that_waits_for_one_that_computes_goes_on_waiting() -> None:
    """Rank 0 waits for rank 1, which waits in an earlier call for rank 2, which computes for as long as it likes."""
    store = dist.HashStore()
    first, second, _ = (waits_of(rank, store, 3) for rank in range(3))
    numbers = [first.begin("ranks"), first.begin("ranks")]
    second.begin("ranks")
    with first.inside(GATHER, "ranks", numbers[1]), second.inside(MESSAGES, "ranks", numbers[0]):
        second.check()
        first.check()
        second.check()


def test_a_call_within_a_backward_pass_is_reached() -> None:
    """A synchronized layer exchanges in it: whoever waits in the layer waits for no pass."""
    store = dist.HashStore()
    first, second = (waits_of(rank, store) for rank in range(2))
    for waits in (first, second):
        waits.begin("backward")
    layer = Call("layer", "a layer")
    with first.inside(PASS, "backward", 0), second.inside(PASS, "backward", 0):
        first.check()
        with first.inside(layer, "layer", first.begin("layer")):
            first.check()
            with second.inside(layer, "layer", second.begin("layer")):
                second.check()
                first.check()


def test_a_failure_is_seen_while_waiting() -> None:
    store = dist.HashStore()
    first, second = (waits_of(rank, store) for rank in range(2))
    for waits in (first, second):
        waits.begin_run(3)
    second.publish_failure("rank 1 (cpu) failed first: KeyError")
    with first.inside(MESSAGES, "ranks", first.begin("ranks")):
        threading.Event().wait(0.01)  # longer than the interval
        with pytest.raises(GaveUpError, match="in global batch 4"):
            first.check()
    first.begin_run(4)
    with first.inside(MESSAGES, "ranks", first.begin("ranks")):
        threading.Event().wait(0.01)
        first.check()


class Work:
    """Completes after `given_up` waits that time out, and just after the last of these."""

    def __init__(self, given_up: int, error: str = "") -> None:
        self.given_up, self.error = given_up, error

    def wait(self, timeout: timedelta | None = None) -> None:
        if self.given_up:
            assert timeout is not None, "it is not over yet"
            self.given_up -= 1
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return not self.given_up


@pytest.mark.parametrize("given_up", [0, 1, 3])
def test_what_comes_just_after_a_look_is_taken(given_up: int) -> None:
    waits = waits_of(0, dist.HashStore())
    waits.complete(Work(given_up), MESSAGES, "ranks", waits.begin("ranks"))  # type: ignore[arg-type] # a stand-in


@pytest.mark.parametrize("given_up", [0, 1, 2])
def test_a_call_that_has_failed_says_why(given_up: int) -> None:
    waits = waits_of(0, None)
    with pytest.raises(LostConnectionError, match="closed"):
        waits.complete(Work(given_up, "closed"), MESSAGES, "ranks", waits.begin("ranks"))  # type: ignore[arg-type] # a stand-in


def test_a_timeout_names_those_who_are_waited_for() -> None:
    """Of three others, rank 1 is there too, rank 2 is elsewhere, and nothing is heard of rank 3."""
    store = dist.HashStore()
    first, second, third, _ = (waits_of(rank, store, 4, timeout=1e-6) for rank in range(4))
    second.begin("ranks")
    for waits in (first, second):
        waits.begin("loader")
    with (
        second.inside(MESSAGES, "ranks", 0),
        third.inside(Call("loader", "a loader"), "loader", third.begin("loader")),
    ):
        second.check()
        third.check()
        with pytest.raises(WaitTimeoutError) as caught:
            first.complete(Work(0, "timed out"), MESSAGES, "ranks", first.begin("ranks"))  # type: ignore[arg-type] # a stand-in
    assert str(caught.value) == (
        "rank 0 (cpu) has waited for 0 s in global batch 4 for rank 2 (cpu), which is in a loader and rank 3 (cpu) "
        "(timed out)"
    )


def test_one_rank_needs_no_store() -> None:
    waits = Waits(0, 1, "cpu", None, None)
    waits.watch()
    with waits.inside(PASS, "backward", waits.begin("backward")):
        waits.check()
    waits.stop_watching()
