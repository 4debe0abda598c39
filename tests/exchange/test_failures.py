"""The error of a failed rank, with a store that the test controls."""

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_hetero.exchange import failures, store
from lightning_hetero.exchange.failures import CollectiveErrors, is_secondary_failure
from lightning_hetero.exchange.waits import GaveUpError, LostConnectionError, Waits


def explain(exception: BaseException, store: Any, rank: int = 0, run: int = 1) -> str:
    waits = Waits(rank, 3, "cpu", store, None)
    waits.begin_run(run)
    failures.explain(exception, waits, CollectiveErrors())
    return str(exception)


class Late:
    """A store in which another rank publishes its failure just when this one begins to wait for it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.timeouts: list[timedelta] = []

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def add(self, key: str, number: int) -> int:
        self.values[key] = str(int(self.values.get(key, 0)) + number)
        return int(self.values[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.values.setdefault(key, value).encode()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.timeouts.append(timeout)
        explain(ArithmeticError("late"), self, rank=1)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def test_a_cause_that_is_published_late_is_waited_for() -> None:
    """But not for long."""
    store = Late()
    said = explain(LostConnectionError("closed by\n peer"), store)
    assert said == "rank 1 (cpu) failed first: ArithmeticError: late (rank 0 then lost the connection: closed by peer)"
    assert max(store.timeouts) <= timedelta(seconds=2)


def test_who_gave_up_waiting_says_where() -> None:
    said = explain(GaveUpError("in global batch 7"), Late())
    assert said == "rank 1 (cpu) failed first: ArithmeticError: late (rank 0 gave up waiting in global batch 7)"


def test_the_first_failure_stays() -> None:
    """A second one keeps its own text; another run starts without failures."""
    store = dist.HashStore()
    first, second, later = ValueError("first"), RuntimeError("second"), ValueError("later")
    explain(first, store, rank=2)
    explain(second, store, rank=1)
    explain(later, store, rank=1, run=2)
    assert (str(first), str(second), str(later)) == ("first", "second", "later")
    assert second.__notes__ == ["rank 2 (cpu) failed first: ValueError: first"]
    assert not hasattr(first, "__notes__")
    assert not hasattr(later, "__notes__")
    assert explain(LostConnectionError("gone"), store, run=2).startswith(
        "rank 1 (cpu) failed first: ValueError: later (rank 0"
    )


@pytest.mark.parametrize("error", [RuntimeError("the ranks differ"), ValueError("the ranks differ"), KeyError("mine")])
def test_only_what_may_be_a_lost_connection_gets_a_note(error: Exception) -> None:
    """An error that all ranks raise is not repeated."""
    store = dist.HashStore()
    explain(RuntimeError("the ranks differ"), store, rank=1)
    explain(error, store)
    assert not hasattr(error, "__notes__")


class Gone(Late):
    """The store ended with the process that had it."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("connection lost")

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        raise dist.DistNetworkError("connection lost")

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        raise dist.DistNetworkError("connection lost")


@pytest.mark.parametrize("store", [Gone(), None])
def test_without_a_store_each_rank_keeps_its_own_text(store: Gone | None) -> None:
    assert explain(ValueError("mine"), store) == "mine"
    said = explain(LostConnectionError("gone"), store)
    assert said.startswith("another rank ended without saying why; it may have been killed")
    assert "gone" in said


def test_ranks_that_have_lost_a_connection_too_are_not_the_ones_that_ended() -> None:
    """Nothing was heard of rank 2: neither a cause, nor that it has lost anything."""
    store = dist.HashStore()
    Waits(2, 3, "cuda:1", store, None)
    explain(LostConnectionError("gone"), store, rank=1)
    said = explain(LostConnectionError("gone"), store, rank=0)
    assert said == (
        "rank 2 (cuda:1) ended without saying why; it may have been killed (rank 0 lost the connection: gone)"
    )


def test_runs_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dist.HashStore()
    monkeypatch.setattr(store, "default_store", lambda: kept)
    assert store.new_run() < store.new_run()


@pytest.mark.parametrize("kind", [dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError])
def test_torchs_own_types_are_secondary(kind: type[Exception]) -> None:
    """NCCL and the store raise these."""
    assert is_secondary_failure(kind("whatever it says"), CollectiveErrors())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("nccl, gloo: connection reset by peer, timed out, broken pipe"),
        TimeoutError("timed out"),
        ConnectionResetError("connection reset by peer"),
    ],
)
def test_the_text_of_an_error_is_never_evidence(error: Exception) -> None:
    """It may be a user's own message, or the name of a folder."""
    assert not is_secondary_failure(error, CollectiveErrors())
