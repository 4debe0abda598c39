"""Global batches in which nothing counts on any rank: said once, since nothing is learnt from them."""

import warnings

import torch
from torch import Tensor


class ZeroCountWarning:
    """Warns on the first rank, once a run, when a global batch has a loss count of 0.

    Args:
        rule: what is counted, in words.
        rank: which this is.
    """

    def __init__(self, rule: str, rank: int) -> None:
        self._rule = rule
        self._silent = rank != 0
        self._on_device: Tensor | None = None

    def look(self, step: int, total: float) -> None:
        """The loss count of a global batch, as the host knows it."""
        if total == 0:
            self._say(f"global batch {step}")

    def look_on_device(self, total: Tensor) -> None:
        """The same where only the device knows; it is asked at the end of the epoch, so that no step waits for it."""
        if not self._silent:
            found = total == 0
            self._on_device = found if self._on_device is None else torch.logical_or(self._on_device, found)

    def end_epoch(self) -> None:
        """The host may wait for the device now."""
        if self._on_device is not None and bool(self._on_device):
            self._say("a global batch of this epoch")
        self._on_device = None

    def _say(self, where: str) -> None:
        if self._silent:
            return
        self._silent = True
        self._on_device = None
        warnings.warn(
            f"nothing in {where} counts on any rank ({self._rule}): its gradient is zero and its loss is left out of "
            "what is logged. Later ones are not mentioned; if there are many, draw other samples, or see whether "
            "ignore_index is the right one",
            stacklevel=2,
        )
