"""Calls between real ranks, and what becomes of an exception on rank 0."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_hetero.exchange.groups import RankGroup
from tests.ranks import run_ranks

RAISED: list[Exception] = [
    ValueError("no number"),
    TypeError("no text"),
    RuntimeError("no luck"),
    FileNotFoundError(2, "No such file", "profile.json"),
    PermissionError("not yours"),
    KeyError("name"),
    UnicodeDecodeError("utf-8", b"a", 0, 1, "odd"),
]


def raising(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def relayed() -> tuple[list[tuple[str, str, bool]], str]:
    """Type and text of this rank's exceptions, whether they are the original objects, and a later result."""
    group = RankGroup(dist.get_rank(), 3, timedelta(seconds=30))
    outcomes = []
    for error in RAISED:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is tested
            group.from_rank_zero(raising(error))
        outcomes.append((type(caught.value).__name__, str(caught.value), caught.value is error))
    return outcomes, group.from_rank_zero(lambda: "and on")


def test_any_exception_of_rank_0_is_raised_on_all_ranks() -> None:
    """Rank 0 raises its own, with its traceback; no rank is left waiting for a result."""
    (first, after), *others = run_ranks(3, relayed)
    assert after == "and on"
    assert first == [(type(error).__name__, str(error), True) for error in RAISED]
    for outcomes, then in others:
        assert then == "and on"
        assert outcomes == [
            ("ValueError", "no number", False),
            ("TypeError", "no text", False),
            ("RuntimeError", "no luck", False),
            ("FileNotFoundError", "[Errno 2] No such file: 'profile.json'", False),
            ("PermissionError", "not yours", False),
            ("RuntimeError", "KeyError: 'name'", False),
            ("RuntimeError", f"UnicodeDecodeError: {RAISED[-1]}", False),
        ]


def exchanged() -> dict[str, Any]:
    rank = dist.get_rank()
    group = RankGroup(rank, 3, timedelta(seconds=30))
    earlier = group.start([rank, 1.0])
    later = group.start([rank, 2.0])
    return {
        "earlier": earlier.wait().tolist(),
        "later": later.wait().tolist(),
        "table": group.start([10.0 * rank]).wait().tolist(),
        "gathered": group.gather("abc"[rank]),
        "flags": group.any_of([rank == 2, False]),
        "broadcast": group.broadcast(rank + 5),
    }


def test_all_ranks_see_the_same() -> None:
    """Rows that are exchanged at the same time don't mix."""
    expected = {
        "earlier": [[0, 1], [1, 1], [2, 1]],
        "later": [[0, 2], [1, 2], [2, 2]],
        "table": [[0], [10], [20]],
        "gathered": ["a", "b", "c"],
        "flags": [True, False],
        "broadcast": 5,
    }
    assert run_ranks(3, exchanged) == [expected] * 3
