"""Exchanges in hooks of an evaluation batch, which some ranks have more of: refused, or answered from before."""
# ruff: noqa: SLF001 - what is read of a Trainer is guarded by `tests/test_private_names.py`

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage

_TRANSFER_HOOKS = frozenset(
    {"batch_to_device", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"}
)


def batch_hook(module: "pl.LightningModule | None") -> str | None:
    """The hook of an evaluation batch that is running; None outside of one.

    Ranks evaluate different numbers of batches, so an exchange in such a hook may wait for a rank that never joins.
    """
    if module is None or module._trainer is None:
        return None
    stage, hook = module._trainer.state.stage, module._current_fx_name
    if stage is None or hook is None or not (stage.evaluating or stage == RunningStage.PREDICTING):
        return None
    is_of_a_batch = hook.endswith(("_step", "_batch_start", "_batch_end")) or hook in _TRANSFER_HOOKS
    return hook if is_of_a_batch else None


class UnmatchedExchangeError(RuntimeError):
    """One rank alone would exchange with the others; its cause is never another rank, so it has a type of its own."""


def exchange_error(call: str, hook: str, stage: RunningStage | None, place: str) -> UnmatchedExchangeError:
    """The error where one rank alone would exchange with the others.

    Args:
        call: the name of the call, such as "all_gather".
        hook: the hook of an evaluation batch that makes it.
        stage: of the evaluation.
        place: rank and device.
    """
    name = "validation"
    if stage in (RunningStage.TESTING, RunningStage.PREDICTING):
        name = "test" if stage == RunningStage.TESTING else "predict"
    return UnmatchedExchangeError(
        f"{place} calls {call} in {hook}, but ranks evaluate different numbers of batches, so the others may never "
        f"join: exchange at the end, such as in on_{name}_epoch_end, or let self.log do it"
    )


class BroadcastCache:
    """Paths that rank 0 has broadcast to all ranks, for hooks in which ranks can't exchange.

    `Trainer.log_dir` is such a broadcast, needed to save images in any batch. It is None for a logger without a folder.
    """

    def __init__(self) -> None:
        self._results: dict[str | Path | None, Any] = {}
        self._is_recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what is broadcast inside, and forget everything before."""
        self._results.clear()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def add(self, own: object, result: Any) -> None:
        """Keep the result of a broadcast, under the value that this rank passed to it."""
        if self._is_recording and isinstance(own, str | Path | None):
            self._results[own] = result

    def __contains__(self, own: object) -> bool:
        return isinstance(own, str | Path | None) and own in self._results

    def __getitem__(self, own: str | Path | None) -> Any:
        return self._results[own]
