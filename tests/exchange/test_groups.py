"""Collective calls without processes: gathered tables, and a single rank."""

import pytest
import torch

from lightning_hetero.exchange.groups import RankGroup, gather_rows


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
