"""Gradients of a loss with a count of 0 are zeros or finite, and all others are unchanged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hetero.step.gradients import gradients_unchanged, gradients_without_nan, without_nan

NUMBERS = st.lists(st.sampled_from([1.0, -2.5, 0.0, float("nan"), float("inf"), -float("inf")]), min_size=1)


@given(NUMBERS, st.booleans(), st.booleans())
def test_a_gradient_that_counts_is_kept_and_another_is_made_finite(
    numbers: list[float], counts: bool, on_device: bool
) -> None:
    """No matter whether the host knows the count or only the device does."""
    gradient = torch.tensor(numbers)
    got = without_nan(gradient, torch.tensor(counts) if on_device else counts)
    expected = gradient if counts else torch.where(gradient.isfinite(), gradient, 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def gradients(module: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    """Gradients after one backward pass, added to earlier gradients of ones."""
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss.backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_backward_pass_of_nan_adds_exact_zeros(on_device: bool) -> None:
    module = nn.Linear(2, 1)
    with gradients_unchanged(module, torch.tensor(False) if on_device else None):
        got = gradients(module, module(torch.ones(1, 2)).sum() * float("nan"))
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in got)
    with gradients_without_nan(module, torch.tensor(False) if on_device else False):
        got = gradients(module, module(torch.ones(1, 2)).sum() * float("nan"))
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in got)


def test_a_mask_that_is_true_changes_nothing_and_hooks_are_removed() -> None:
    module = nn.Linear(2, 1)
    plain = gradients(module, module(torch.ones(1, 2)).sum())
    with gradients_unchanged(module, torch.tensor(True)), gradients_without_nan(module, torch.tensor(True)):
        inside = gradients(module, module(torch.ones(1, 2)).sum())
    after = gradients(module, module(torch.ones(1, 2)).sum())
    for one, two, three in zip(plain, inside, after, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
