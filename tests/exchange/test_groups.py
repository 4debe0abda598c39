"""Collective calls without processes: pending rows and gathered tables."""

from datetime import timedelta

import pytest
import torch

from lightning_hetero.exchange.groups import LostConnectionError, PendingRows, RankGroup, gather_rows


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
def test_rows_that_come_just_after_a_wait_timed_out_are_taken(given_up: int) -> None:
    asked: list[int] = []
    rows = PendingRows(torch.ones(2, 3, dtype=torch.float64), Work(given_up)).wait(lambda: asked.append(1))  # type: ignore[arg-type] # a stand-in
    assert rows.tolist() == [[1.0] * 3] * 2
    assert len(asked) == max(0, given_up - 1)


@pytest.mark.parametrize("given_up", [0, 1, 2])
def test_a_call_that_has_failed_says_why(given_up: int) -> None:
    pending = PendingRows(torch.ones(2, 3, dtype=torch.float64), Work(given_up, "connection closed"))  # type: ignore[arg-type] # a stand-in
    with pytest.raises(LostConnectionError, match="connection closed"):
        pending.wait()


def test_a_sum_of_tables_with_one_row_each_is_a_gather() -> None:
    """On the row's device and in its dtype; a NaN stays in its own row."""
    rows = [torch.tensor([1.5, float("nan")]), torch.tensor([-2.0, 3.0]), torch.zeros(2)]
    tables: list[torch.Tensor] = []
    for rank, row in enumerate(rows):
        gather_rows(row, rank, 3, lambda table: tables.append(table.clone()))
    gathered = gather_rows(rows[0], 0, 3, lambda table: table.copy_(sum(tables)))
    assert gathered.dtype == torch.float32
    assert torch.equal(gathered.nan_to_num(7.0), torch.stack(rows).nan_to_num(7.0))


def test_one_rank_needs_no_processes() -> None:
    group = RankGroup(0, 1, None)
    assert group.start([1.0, 2.0]).wait().tolist() == [[1.0, 2.0]]
    assert group.gather("a") == ["a"]
    assert group.broadcast("b") == "b"
    assert group.any_of([True, False]) == [True, False]
    assert group.from_rank_zero(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        group.from_rank_zero(lambda: 1 // 0)
