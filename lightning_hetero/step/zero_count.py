"""A warning about global batches in which nothing counts on any rank: they train nothing."""

import warnings

from torch import Tensor


class ZeroCountWarning:
    """Warns on the first rank, once a run, when a global batch has a loss count of 0; `rule` says what is counted."""

    def __init__(self, rule: str, rank: int) -> None:
        self._rule = rule
        self._is_silent = rank != 0
        self._on_device: Tensor | None = None

    def check(self, step: int, total: float) -> None:
        """Warn if the loss count of a global batch is 0."""
        if total == 0:
            self._warn(f"global batch {step}")

    def check_on_device(self, total: Tensor) -> None:
        """For a count that only the device knows; the host reads it at the end of the epoch, so no step waits."""
        if not self._is_silent:
            found = total == 0
            self._on_device = found if self._on_device is None else self._on_device | found

    def end_epoch(self) -> None:
        """Warn of what was found on the device; the host waits for it here."""
        if self._on_device is not None and bool(self._on_device):
            self._warn("a global batch of this epoch")
        self._on_device = None

    def _warn(self, where: str) -> None:
        if self._is_silent:
            return
        self._is_silent = True
        warnings.warn(
            f"nothing in {where} counts on any rank ({self._rule}): its gradient is zero and its loss is left out of "
            "what is logged. Later ones are not mentioned; if there are many, draw other samples, or see whether "
            "ignore_index is the right one",
            stacklevel=2,
        )
