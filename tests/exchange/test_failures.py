"""The error of a failed rank, with a store that the test controls."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_hetero.exchange import failures
from lightning_hetero.exchange.failures import CollectiveErrors, is_secondary_failure
from lightning_hetero.exchange.groups import LostConnectionError


def explain(exception: BaseException, rank: int = 0, run: int = 1) -> str:
    failures.explain(exception, run=run, rank=rank, device="cpu", averaging=CollectiveErrors())
    return str(exception)


class Late:
    """A store in which another rank publishes its failure just when this one begins to wait for it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.timeouts: list[timedelta] = []

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.values.setdefault(key, value).encode()

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.timeouts.append(timeout)
        explain(ArithmeticError("late"), rank=1)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def test_a_cause_that_is_published_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for long."""
    store = Late()
    monkeypatch.setattr(failures, "default_store", lambda: store)
    said = explain(LostConnectionError("closed by\n peer"))
    assert said == "rank 1 (cpu) failed first: ArithmeticError: late (rank 0 then lost the connection: closed by peer)"
    assert max(store.timeouts) <= timedelta(seconds=2)


def test_the_first_failure_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one keeps its own text; another run starts without failures."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "default_store", lambda: store)
    first, second, later = ValueError("first"), RuntimeError("second"), ValueError("later")
    explain(first, rank=2)
    explain(second, rank=1)
    explain(later, rank=1, run=2)
    assert (str(first), str(second), str(later)) == ("first", "second", "later")
    assert second.__notes__ == ["rank 2 (cpu) failed first: ValueError: first"]
    assert not hasattr(first, "__notes__")
    assert not hasattr(later, "__notes__")
    assert explain(LostConnectionError("gone"), run=2).startswith(
        "rank 1 (cpu) failed first: ValueError: later (rank 0"
    )


@pytest.mark.parametrize("error", [RuntimeError("the ranks differ"), ValueError("the ranks differ"), KeyError("mine")])
def test_only_what_may_be_a_lost_connection_gets_a_note(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """An error that all ranks raise is not repeated."""
    store = dist.HashStore()
    monkeypatch.setattr(failures, "default_store", lambda: store)
    explain(RuntimeError("the ranks differ"), rank=1)
    explain(error)
    assert not hasattr(error, "__notes__")


class Gone(Late):
    """The store ended with rank 0."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        raise dist.DistNetworkError("connection lost")

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        raise dist.DistNetworkError("connection lost")


@pytest.mark.parametrize("store", [Gone(), None])
def test_without_a_store_each_rank_keeps_its_own_text(monkeypatch: pytest.MonkeyPatch, store: Gone | None) -> None:
    monkeypatch.setattr(failures, "default_store", lambda: store)
    assert explain(ValueError("mine")) == "mine"
    said = explain(LostConnectionError("gone"))
    assert said.startswith("another rank ended without saying why; it may have been killed")
    assert "gone" in said


def test_runs_have_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(failures, "default_store", lambda: store)
    assert failures.new_run() < failures.new_run()


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
