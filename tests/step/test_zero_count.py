"""A global batch with a count of 0 gives one warning, on rank 0, and no step waits for the device."""

import warnings
from collections.abc import Callable

import pytest
import torch

from lightning_hetero.step.zero_count import ZeroCountWarning


def warned(call: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def test_it_warns_once() -> None:
    zero_count = ZeroCountWarning("valid targets", rank=0)
    assert not warned(lambda: zero_count.check(3, 2.0))
    (text,) = warned(lambda: zero_count.check(4, 0.0))
    assert "nothing in global batch 4 counts on any rank (valid targets)" in text
    assert not warned(lambda: zero_count.check(5, 0.0))
    assert not warned(lambda: ZeroCountWarning("valid targets", rank=1).check(4, 0.0))


@pytest.mark.parametrize(("totals", "expected"), [([3.0, 0.0, 2.0], 1), ([3.0, 2.0], 0), ([], 0)])
def test_counts_on_the_device_are_read_at_the_end_of_the_epoch(totals: list[float], expected: int) -> None:
    zero_count = ZeroCountWarning("samples", rank=0)
    for total in totals:
        assert not warned(lambda total=total: zero_count.check_on_device(torch.tensor(total)))
    assert len(warned(zero_count.end_epoch)) == expected
    assert not warned(zero_count.end_epoch)
