"""`Trainer.log_dir` in the hooks of an evaluation batch: known on each rank, without a broadcast."""
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


def in_evaluation_batch(module: "pl.LightningModule | None") -> bool:
    """Whether a hook of an evaluation batch is running."""
    if module is None or module._trainer is None:
        return False
    stage, hook = module._trainer.state.stage, module._current_fx_name
    if stage is None or hook is None or not (stage.evaluating or stage == RunningStage.PREDICTING):
        return False
    return hook.endswith(("_step", "_batch_start", "_batch_end")) or hook in _TRANSFER_HOOKS


class BroadcastCache:
    """Paths that rank 0 has broadcast to all ranks before an evaluation.

    `Trainer.log_dir` is such a broadcast, and often read on rank 0 only, to save an image of a batch; the others would
    be left out of it. It is None for a logger without a folder.
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
