"""A warning about global batches with a loss count of 0: they don't train anything."""

import warnings

from torch import Tensor


class ZeroCountWarning:
    """Warns on rank 0, once per run, when a global batch has a loss count of 0; `rule` says what is counted."""

    def __init__(self, rule: str, rank: int) -> None:
        self._rule = rule
        self._is_silent = rank != 0
        self._on_device: Tensor | None = None

    def check(self, step: int, total: float) -> None:
        """Warn if the loss count of a global batch is 0."""
        if total == 0:
            self._warn(f"global batch {step}")

    def check_on_device(self, total: Tensor) -> None:
        """The same for a count that only the device knows; read at the end of the epoch, so that no step waits."""
        if not self._is_silent:
            found = total == 0
            self._on_device = found if self._on_device is None else self._on_device | found

    def end_epoch(self) -> None:
        """Warn if a count on the device was 0; the host waits for the device here."""
        if self._on_device is not None and bool(self._on_device):
            self._warn("a global batch of this epoch")
        self._on_device = None

    def _warn(self, where: str) -> None:
        if self._is_silent:
            return
        self._is_silent = True
        warnings.warn(
            f"nothing in {where} counts on any rank ({self._rule}): its gradient is zero and its loss is left out of "
            "what is logged. Later ones are not reported; if there are many, draw other samples, or check that "
            "ignore_index is right",
            stacklevel=2,
        )
