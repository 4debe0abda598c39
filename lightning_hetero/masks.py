"""Backward passes that leave gradients alone: of a batch in which nothing counts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A backward pass inside adds what `hook` makes of each gradient."""
    handles = [parameter.register_hook(hook) for parameter in module.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_left_alone(module: nn.Module, unless: Tensor | None = None) -> AbstractContextManager[None]:
    """A backward pass inside adds exact zeros to the gradients, whatever it computes.

    Weight 0 is not enough: the mean over an empty set is NaN, and so is 0 x NaN.

    Args:
        module: whose gradients.
        unless: a truth value on the device; where it is true, gradients are what they are. The host never reads it.
    """
    if unless is None:
        return _hooked(module, torch.zeros_like)
    return _hooked(module, lambda gradient: torch.where(unless, gradient, torch.zeros_like(gradient)))


def gradients_without_nan(module: nn.Module, counts: bool | Tensor) -> AbstractContextManager[None]:
    """A backward pass inside, of a loss times 0, adds no NaN to the gradients where nothing counts.

    Unlike `gradients_left_alone` it keeps what synchronised layers bring from other ranks.
    """

    def clean(gradient: Tensor) -> Tensor:
        without = gradient.nan_to_num(0.0, 0.0, 0.0)
        return torch.where(counts, gradient, without) if isinstance(counts, Tensor) else without

    return _hooked(module, clean)
