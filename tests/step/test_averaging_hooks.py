"""Communication hooks around a bucket of gradients, without other ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetero.device.step_timer import ComputeTimer
from lightning_hetero.step.gradients import masked_hook, timed_hook


class Device:
    """A device whose time the test sets."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def has_passed(self, point: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class Bucket:
    """Gradients as DDP hands them to its hook."""

    def __init__(self, gradients: Tensor, *, last: bool) -> None:
        self.gradients, self.last = gradients, last

    def buffer(self) -> Tensor:
        return self.gradients

    def is_last(self) -> bool:
        return self.last


@pytest.mark.parametrize(("may_wait", "compute"), [(False, 1 + 2 * 3 + 2), (True, 1 + 2)])
def test_compute_time_ends_with_the_last_bucket(may_wait: bool, compute: float) -> None:
    """The hook's own time counts unless it may wait for others; what comes after the last bucket never does."""
    device = Device()
    timer = ComputeTimer(device)

    def takes_3(state: Any, bucket: Any) -> Any:
        device.time += 3
        return torch.futures.Future()

    hook = timed_hook(takes_3, timer, may_wait=may_wait)
    timer.start()
    device.time += 1
    hook(None, Bucket(torch.ones(2), last=False))
    device.time += 2
    hook(None, Bucket(torch.ones(2), last=True))
    device.time += 100
    timer.backward_over()
    timing = timer.stop()
    assert timing is not None
    assert timing.compute_seconds() == compute
    assert timing.sync_seconds() == 100 + (3 if may_wait else 0)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [(None, [1.0, float("nan")]), (torch.tensor(True), [1.0, float("nan")]), (torch.tensor(False), [0.0, 0.0])],
)
def test_a_mask_makes_exact_zeros(mask: Tensor | None, expected: list[float]) -> None:
    """Also of NaN, which a weight of 0 would leave."""
    gradients = torch.tensor([1.0, float("nan")])
    seen: list[Tensor] = []

    def hook(state: Any, bucket: Any) -> Any:
        seen.append(bucket.buffer().clone())
        return torch.futures.Future()

    masked_hook(hook, lambda: mask)(None, Bucket(gradients, last=True))  # type: ignore[arg-type]
    assert torch.equal(seen[0].nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0))
