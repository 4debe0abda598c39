"""Measurements of optimizer steps wait for their device, and are returned once, in order."""

import pytest

from lightning_hetero.device.step_timer import StepTiming
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.compute_times import ComputeTimes

FULL = 8
"""Samples of a full global batch."""


class Device:
    """A device that has reached `time`, which the test sets."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def has_passed(self, point: float) -> bool:
        return self.time >= point

    def seconds(self, start: float, end: float) -> float:
        assert self.has_passed(end)
        return end - start


def add(
    times: ComputeTimes,
    device: Device,
    step: int,
    *,
    stepped: bool = True,
    counts: tuple[int, int] = (6, 2),
    borrowed: bool = False,
    in_parts: bool = False,
    after: bool = False,
) -> None:
    """A micro-batch that begins on the device at `10 * step`, and takes 1 + step seconds."""
    begin = 10.0 * step
    timing = StepTiming(device, ((begin, begin + 1 + step),), ((begin + 1 + step, begin + 1.5 + step),))
    share = Share(step, counts, borrowed, 1)
    times.add(timing, share, FULL, stepped=stepped, in_parts=in_parts, averaged_after_backward=after)


def measured(times: ComputeTimes) -> tuple[int, float, float, bool] | None:
    found = times.next_measurement()
    if found is None:
        return None
    return found.measured_step, found.compute_seconds, found.sync_seconds, found.averaged_after_backward


def test_a_measurement_waits_for_the_device_and_is_handed_out_once() -> None:
    device, times = Device(), ComputeTimes()
    assert measured(times) is None
    add(times, device, 0)
    add(times, device, 1, after=True)
    assert measured(times) is None, "the device is not there yet"
    device.time = 5.0
    assert measured(times) == (0, 1.0, 0.5, False)
    assert measured(times) is None
    device.time = 50.0
    assert measured(times) == (1, 2.0, 0.5, True)
    assert measured(times) is None


def test_micro_batches_make_one_measurement() -> None:
    device, times = Device(), ComputeTimes()
    device.time = 1000.0
    for step, (stepped, accumulates) in enumerate([(False, True), (False, True), (True, False), (False, True)]):
        add(times, device, step, stepped=stepped)
        assert times.accumulates == accumulates
    assert measured(times) == (2, 2.0, 0.5, False), "the mean of 1, 2 and 3 seconds"
    assert measured(times) is None, "the next optimizer step has only begun"
    add(times, device, 4)
    assert measured(times) == (4, 4.5, 0.5, False), "nothing of the step before"


@pytest.mark.parametrize(
    "options",
    [{"borrowed": True}, {"in_parts": True}, {"counts": (2, 1)}],
    ids=["borrowed samples", "in parts", "a short batch"],
)
def test_a_step_that_can_not_be_compared_is_left_out(options: dict[str, object]) -> None:
    device, times = Device(), ComputeTimes()
    device.time = 1000.0
    add(times, device, 0, **options)  # type: ignore[arg-type]
    assert not times.accumulates
    add(times, device, 1)
    assert measured(times) == (1, 2.0, 0.5, False)
    assert measured(times) is None


def test_what_was_not_timed_or_is_sharded_by_the_user_is_left_out() -> None:
    device, times = Device(), ComputeTimes()
    timing = StepTiming(device, ((0.0, 0.0),))
    for pair in ((None, Share(0, (6, 2), False, 1)), (timing, None)):
        times.add(*pair, FULL, stepped=True, in_parts=False, averaged_after_backward=False)
    assert measured(times) is None


def test_of_a_device_that_is_far_behind_the_oldest_steps_are_dropped() -> None:
    """Keeps the number of waiting steps bounded."""
    device, times = Device(), ComputeTimes()
    steps = 3 * ComputeTimes.MAX_PENDING
    for step in range(steps):
        add(times, device, step)
    device.time = 1e9
    found = [measured(times) for _ in range(ComputeTimes.MAX_PENDING)]
    assert [one[0] for one in found if one is not None] == list(range(steps - ComputeTimes.MAX_PENDING, steps))
    assert measured(times) is None
