"""Waiting for the other ranks' rows: patience may end just when they come."""

from datetime import timedelta

import pytest
import torch

from lightning_hetero.exchange.groups import PendingRows


class Work:
    """Is over after so many waits that were given up; the last of these is given up a moment too early."""

    def __init__(self, given_up: int, error: str = "") -> None:
        self.given_up, self.error = given_up, error

    def wait(self, patience: timedelta | None = None) -> None:
        if self.given_up:
            assert patience is not None, "it is not over yet"
            self.given_up -= 1
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return not self.given_up


@pytest.mark.parametrize("given_up", [0, 1, 3])
def test_rows_that_come_just_after_patience_has_ended_are_taken(given_up: int) -> None:
    asked: list[int] = []
    rows = PendingRows(torch.ones(2, 3, dtype=torch.float64), Work(given_up)).wait(lambda: asked.append(1))  # type: ignore[arg-type]
    assert rows.tolist() == [[1.0] * 3] * 2
    assert len(asked) == max(0, given_up - 1)


@pytest.mark.parametrize("given_up", [0, 1, 2])
def test_an_exchange_that_has_failed_says_why(given_up: int) -> None:
    pending = PendingRows(torch.ones(2, 3, dtype=torch.float64), Work(given_up, "connection closed"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="connection closed"):
        pending.wait()
