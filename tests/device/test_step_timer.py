"""The timer counts what a rank computes and nothing else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.device.step_timer import ComputeTimer, StepTiming


class Device:
    """A device whose time the test sets; it has passed the points up to `passed`."""

    def __init__(self) -> None:
        self.time = 0.0
        self.passed = float("inf")

    def now(self) -> float:
        return self.time

    def has_passed(self, point: float) -> bool:
        return point <= self.passed

    def seconds(self, start: float, end: float) -> float:
        return end - start


@given(st.lists(st.tuples(st.sampled_from(["work", "wait", "nested"]), st.floats(0, 10)), max_size=20))
def test_computing_is_counted_and_waits_are_not(events: list[tuple[str, float]]) -> None:
    """Whatever the order of work, waits and waits within waits."""
    device = Device()
    timer = ComputeTimer(device)
    timer.start()
    worked = 0.0
    for kind, seconds in events:
        if kind == "work":
            device.time += seconds
            worked += seconds
        elif kind == "wait":
            with timer.waiting():
                device.time += seconds
        else:
            with timer.waiting(), timer.waiting():
                device.time += seconds
    timing = timer.stop()
    assert timing is not None
    assert timing.compute_seconds() == pytest.approx(worked)


def test_outside_a_step_nothing_is_counted() -> None:
    """Validation and checkpoints lie between steps: what ends there starts nothing."""
    device = Device()
    timer = ComputeTimer(device)
    assert timer.stop() is None
    timer.backward_over()
    with timer.waiting():
        device.time += 5
    assert timer.stop() is None


def test_an_unfinished_step_is_dropped() -> None:
    """A batch that was skipped does not add to the next one."""
    device = Device()
    timer = ComputeTimer(device)
    timer.start()
    device.time += 100
    timer.start()
    device.time += 1
    timing = timer.stop()
    assert timing is not None
    assert timing.compute_seconds() == 1


def test_a_device_that_is_behind_is_not_read() -> None:
    """It can be read once the device has reached its end."""
    device = Device()
    timer = ComputeTimer(device)
    timer.start()
    device.time += 2
    timing = timer.stop()
    assert timing is not None
    device.passed = 1.0
    assert not timing.has_passed()
    device.passed = 2.0
    assert timing.has_passed()


def test_a_clock_that_goes_back_is_an_error() -> None:
    """A wrong measurement is worse than none."""
    stretches: Any = [(2.0, 1.0)]
    with pytest.raises(RuntimeError, match=r"went back by 1\.0 s"):
        StepTiming(Device(), stretches).compute_seconds()


def test_averaging_is_no_compute_time() -> None:
    """From the last gradient to the averaged ones a rank waits or communicates; all backward passes count."""
    device = Device()
    timer = ComputeTimer(device)
    timer.gradients_ready()  # outside a step
    timer.backward_over()
    timer.start()
    for _ in range(2):
        device.time += 3
        timer.gradients_ready()
        device.time += 0.5
        timer.backward_over()
        device.time += 1
    timing = timer.stop()
    assert timing is not None
    assert timing.compute_seconds() == 8
    assert timing.sync_seconds() == 1


def test_a_backward_pass_without_averaging_has_none() -> None:
    device = Device()
    timer = ComputeTimer(device)
    timer.start()
    device.time += 2
    timer.backward_over()
    device.time += 2
    timing = timer.stop()
    assert timing is not None
    assert (timing.compute_seconds(), timing.sync_seconds()) == (4, 0)
