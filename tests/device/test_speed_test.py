"""A short measurement distinguishes fast ranks from slow ones, and leaves no trace."""

import pytest
import torch

from lightning_hetero.device import speed_test


class Clock:
    """A clock that only advances when an image is convolved."""

    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self.seconds = seconds

    def convolve(self, image: torch.Tensor, kernel: torch.Tensor, padding: int) -> None:
        self.now += self.seconds


@pytest.mark.parametrize("seconds", [0.001, 0.008, 0.3])
def test_speed_is_images_a_second(monkeypatch, seconds):
    """Also where one image takes longer than the whole measurement should."""
    clock = Clock(seconds)
    monkeypatch.setattr(speed_test, "conv2d", clock.convolve)
    monkeypatch.setattr(speed_test, "perf_counter", lambda: clock.now)
    assert speed_test.speed() == pytest.approx(1 / seconds)
    # the first image is not timed, and the last one begins before the time is up
    assert clock.now <= speed_test.SECONDS + 2 * seconds


def test_a_real_one_comes_to_an_end():
    assert speed_test.speed() > 0


def test_nothing_random_is_drawn_and_no_mode_is_left_behind():
    before = torch.get_rng_state()
    speed_test.speed()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
