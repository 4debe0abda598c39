"""Which micro-batches of an optimizer step show how long a rank computes."""

from typing import Any

import pytest

from lightning_hetero.device.step_timer import HostClock, StepTiming
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.accumulation import AccumulationWindow, WindowMeasurement


def timing(seconds: float, sync: float = 0.0) -> StepTiming:
    """Compute time of so many seconds, and then the gradients' way to their averages."""
    return StepTiming(HostClock(), ((0.0, seconds),), ((seconds, seconds + sync),))


def share(step: int, *counts: int, borrowed: bool = False, checksum: int = 1) -> Share:
    return Share(step, counts, borrowed, checksum)


def test_the_mean_of_micro_batches() -> None:
    window = AccumulationWindow()
    window.add(timing(2.0, 0.5), share(4, 6, 2), 8)
    window.add(timing(4.0, 1.5), share(5, 6, 2), 8, averaged_after_backward=True)
    assert window.is_comparable()
    assert window.has_passed()
    assert window.measured() == WindowMeasurement(5, 3.0, 1.0, averaged_after_backward=True)


def test_a_short_last_batch_is_left_out() -> None:
    """Accumulation over a whole epoch has one in each window, and would never be measured otherwise."""
    window = AccumulationWindow()
    for step, counts in enumerate([(6, 2), (6, 2), (2, 1)]):
        window.add(timing(sum(counts)), share(step, *counts), 8)
    assert window.is_comparable()
    assert window.measured() == WindowMeasurement(1, 8.0, 0.0, averaged_after_backward=False)


def test_a_window_of_short_batches_measures_nothing() -> None:
    window = AccumulationWindow()
    assert not window.is_comparable()
    window.add(timing(1.0), share(0, 2, 1), 8)
    assert not window.is_comparable()


@pytest.mark.parametrize(
    "other",
    [
        {"timing": timing(1.0), "share": share(1, 8, 0, borrowed=True)},
        {"timing": timing(1.0), "share": share(1, 6, 2, checksum=2)},
        {"timing": timing(1.0), "share": share(1, 6, 2), "in_parts": True},
        {"timing": None, "share": share(1, 6, 2)},
        {"timing": timing(1.0), "share": None},
    ],
    ids=["borrowed samples", "another plan", "in parts", "not timed", "the user shards"],
)
def test_what_can_not_be_compared(other: dict[str, Any]) -> None:
    window = AccumulationWindow()
    window.add(timing(1.0), share(0, 6, 2), 8)
    window.add(**other, global_batch=8)
    assert not window.is_comparable()
