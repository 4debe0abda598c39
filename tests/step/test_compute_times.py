"""Which micro-batches of an optimizer step show how long a rank computes."""

from typing import Any

import pytest

from lightning_hetero.device.step_timer import HostClock, StepTiming
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.compute_times import ComputeTimes, StepMeasurement


def timing(seconds: float, sync: float = 0.0) -> StepTiming:
    """A timing with these seconds of compute time, and then of sync time."""
    return StepTiming(HostClock(), ((0.0, seconds),), ((seconds, seconds + sync),))


def share(step: int, *counts: int, borrowed: bool = False, checksum: int = 1) -> Share:
    return Share(step, counts, borrowed, checksum)


def test_the_mean_of_micro_batches() -> None:
    times = ComputeTimes()
    times.add(timing(2.0, 0.5), share(4, 6, 2), 8, stepped=False)
    assert times.accumulates
    assert times.next_measurement() is None
    times.add(timing(4.0, 1.5), share(5, 6, 2), 8, stepped=True, averaged_after_backward=True)
    assert not times.accumulates
    assert times.next_measurement() == StepMeasurement(5, 3.0, 1.0, averaged_after_backward=True)
    assert times.next_measurement() is None


def test_a_short_last_batch_is_left_out() -> None:
    """Accumulation over a whole epoch has one in each optimizer step, and would never be measured otherwise."""
    times = ComputeTimes()
    for step, counts in enumerate([(6, 2), (6, 2), (2, 1)]):
        times.add(timing(sum(counts)), share(step, *counts), 8, stepped=step == 2)
    assert times.next_measurement() == StepMeasurement(1, 8.0, 0.0, averaged_after_backward=False)


def test_an_optimizer_step_of_short_batches_measures_nothing() -> None:
    times = ComputeTimes()
    times.add(timing(1.0), share(0, 2, 1), 8, stepped=True)
    assert times.next_measurement() is None


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
    """It invalidates its own optimizer step, but not the next one."""
    times = ComputeTimes()
    times.add(timing(1.0), share(0, 6, 2), 8, stepped=False)
    times.add(**other, global_batch=8, stepped=True)
    times.add(timing(3.0), share(2, 6, 2), 8, stepped=True)
    assert times.next_measurement() == StepMeasurement(2, 3.0, 0.0, averaged_after_backward=False)


class Behind:
    """A device that reaches a point when the test says so."""

    passed = False

    def now(self) -> float:
        return 0.0

    def has_passed(self, point: float) -> bool:
        return self.passed

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_a_measurement_waits_for_the_device() -> None:
    times, device = ComputeTimes(), Behind()
    times.add(StepTiming(device, ((0.0, 2.0),)), share(0, 6, 2), 8, stepped=True)
    assert times.next_measurement() is None
    device.passed = True
    measured = times.next_measurement()
    assert measured is not None
    assert measured.compute_seconds == 2
