"""The stopwatch counts a rank's own work and nothing else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.device.step_timer import ComputeTimer, StepTiming


class Device:
    """A clock in the test's hand; with `behind`, points are passed only when `now` has come to them."""

    def __init__(self) -> None:
        self.time = 0.0
        self.passed = float("inf")

    def mark(self) -> float:
        return self.time

    def known(self, mark: float) -> bool:
        return mark <= self.passed

    def seconds(self, start: float, end: float) -> float:
        return end - start


@given(st.lists(st.tuples(st.sampled_from(["work", "wait", "nested"]), st.floats(0, 10)), max_size=20))
def test_work_is_counted_and_waits_are_not(events: list[tuple[str, float]]) -> None:
    """Whatever the order of work, waits and waits within waits."""
    device = Device()
    clock = ComputeTimer(device)
    clock.start()
    worked = 0.0
    for kind, seconds in events:
        if kind == "work":
            device.time += seconds
            worked += seconds
        elif kind == "wait":
            clock.pause()
            device.time += seconds
            clock.resume()
        else:
            with clock.waiting(), clock.waiting():
                device.time += seconds
    reading = clock.stop()
    assert reading is not None
    assert reading.seconds() == pytest.approx(worked)


def test_outside_a_step_nothing_is_counted() -> None:
    """Validation and checkpoints lie between steps: resuming there starts nothing."""
    device = Device()
    clock = ComputeTimer(device)
    assert clock.stop() is None
    clock.resume()
    with clock.waiting():
        device.time += 5
    assert clock.stop() is None


def test_an_unfinished_step_is_forgotten() -> None:
    """A batch that was skipped does not add to the next one."""
    device = Device()
    clock = ComputeTimer(device)
    clock.start()
    device.time += 100
    clock.start()
    device.time += 1
    reading = clock.stop()
    assert reading is not None
    assert reading.seconds() == 1


def test_a_device_that_is_behind_is_not_read() -> None:
    """A reading is known when the device has come to its end."""
    device = Device()
    clock = ComputeTimer(device)
    clock.start()
    device.time += 2
    reading = clock.stop()
    assert reading is not None
    device.passed = 1.0
    assert not reading.known()
    device.passed = 2.0
    assert reading.known()


def test_a_clock_that_goes_back_is_an_error() -> None:
    """A wrong measurement is worse than none."""
    stretches: Any = [(2.0, 1.0)]
    with pytest.raises(RuntimeError, match=r"went back by 1\.0 s"):
        StepTiming(Device(), stretches).seconds()


def test_averaging_is_told_apart_from_own_work() -> None:
    """From the last gradient to the averaged ones a rank waits or communicates; all backward passes count."""
    device = Device()
    clock = ComputeTimer(device)
    clock.gradients_ready()  # outside a step
    clock.backward_over()
    clock.start()
    for _ in range(2):
        device.time += 3
        clock.gradients_ready()
        device.time += 0.5
        clock.backward_over()
        device.time += 1
    reading = clock.stop()
    assert reading is not None
    assert reading.seconds() == 8
    assert reading.averaging_seconds() == 1


def test_a_backward_pass_without_averaging_has_none() -> None:
    device = Device()
    clock = ComputeTimer(device)
    clock.start()
    device.time += 2
    clock.backward_over()
    device.time += 2
    reading = clock.stop()
    assert reading is not None
    assert (reading.seconds(), reading.averaging_seconds()) == (4, 0)
