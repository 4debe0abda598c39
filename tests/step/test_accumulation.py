"""What of an optimizer step's micro-batches tells how long a rank works."""

from lightning_hetero.device.step_timer import HostClock, StepTiming
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.accumulation import AccumulationWindow


def reading(seconds: float) -> StepTiming:
    """Work of so many seconds, and nothing to wait for."""
    return StepTiming(HostClock(), ((0.0, seconds),))


def share(step: int, *counts: int, borrowed: bool = False, checksum: int = 1) -> Share:
    return Share(step, counts, borrowed, checksum)


def test_a_short_last_batch_is_left_out() -> None:
    """Accumulation over a whole epoch has one in each window, and would never tell anything."""
    window = AccumulationWindow()
    for step, counts in enumerate([(6, 2), (6, 2), (2, 1)]):
        window.add(reading(sum(counts)), share(step, *counts), 8)
    assert window.usable()
    assert window.known()
    told = window.measured()
    assert (told["measured_step"], told["compute_seconds"]) == (1, 8.0)


def test_short_batches_alone_tell_nothing() -> None:
    window = AccumulationWindow()
    window.add(reading(1.0), share(0, 2, 1), 8)
    assert not window.usable()


def test_borrowed_samples_another_plan_and_untimed_work_spoil_it() -> None:
    for spoilt in (
        (reading(1.0), share(1, 8, 0, borrowed=True)),
        (reading(1.0), share(1, 6, 2, checksum=2)),
        (None, share(1, 6, 2)),
        (reading(1.0), None),
    ):
        window = AccumulationWindow()
        window.add(reading(1.0), share(0, 6, 2), 8)
        window.add(*spoilt, 8)
        assert not window.usable()
