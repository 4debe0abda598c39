"""A probe tells fast ranks from slow ones, and leaves no trace."""

import torch

from lightning_hetero import probe


def test_a_rank_that_needs_longer_is_slower(monkeypatch):
    """Eight times the work for an image, and a wide margin for what else the machine does."""
    convolve = probe._convolve

    def slowly(image, kernel):
        for _ in range(8):
            convolve(image, kernel)

    fast = probe.speed()
    monkeypatch.setattr(probe, "_convolve", slowly)
    assert 0 < probe.speed() < fast / 2


def test_nothing_random_is_drawn_and_no_mode_is_left_behind():
    before = torch.get_rng_state()
    probe.speed()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
