"""The comparison of an idiom's values sees what differs, and nothing else."""

import math
from typing import Any

import pytest
import torch

from tests.idioms.gallery import Alike, PerSample, differences

NAN = math.nan
SAME: list[tuple[Any, list[Any]]] = [
    (1.0, [1.0 + 1e-12, 1.0]),
    (torch.tensor([1.0, NAN]), [torch.tensor([1.0, NAN])] * 2),
    ([[1, 2], [3]], [[[1, 2], [3]]] * 2),
    (["a.ckpt"], [["a.ckpt"]] * 2),
    (PerSample({0: 1.0, 1: 2.0}), [PerSample({1: 2.0}), PerSample({0: 1.0})]),
    (Alike(1.0), [Alike(2.0), Alike(2.0)]),
]
DIFFERENT: list[tuple[Any, list[Any]]] = [
    (1.0, [1.0, 1.001]),
    (0.0, [0.0, 1e-12]),
    (1.0, [NAN, NAN]),
    (torch.ones(2), [torch.ones(2), torch.ones(3)]),
    ([[1, 2], [3]], [[[1, 2], [4]]] * 2),
    (["a.ckpt"], [["a.ckpt"], []]),
    (PerSample({0: 1.0, 1: 2.0}), [PerSample({1: 2.0}), PerSample({})]),
    (PerSample({0: 1.0, 1: 2.0}), [PerSample({1: 2.0}), PerSample({0: 1.0, 1: 2.0})]),
    (PerSample({0: 1.0, 1: 2.0}), [PerSample({1: 2.0}), PerSample({0: 1.5})]),
    (Alike(1.0), [Alike(2.0), Alike(3.0)]),
]


@pytest.mark.parametrize(("one", "ranks"), SAME, ids=str)
def test_same(one: Any, ranks: list[Any]) -> None:
    assert differences({"key": one}, [{"key": value} for value in ranks], 1e-10) == []


@pytest.mark.parametrize(("one", "ranks"), DIFFERENT, ids=str)
def test_different(one: Any, ranks: list[Any]) -> None:
    assert len(differences({"key": one}, [{"key": value} for value in ranks], 1e-10)) >= 1


def test_a_value_may_be_missing_on_other_ranks_than_the_first() -> None:
    """What is logged with `rank_zero_only=True`, or written by rank 0."""
    assert differences({"key": 1.0}, [{"key": 1.0}, {}], 1e-10) == []
    assert len(differences({"key": 1.0}, [{}, {"key": 1.0}], 1e-10)) == 1
    assert len(differences({}, [{"key": 1.0}, {}], 1e-10)) == 1
