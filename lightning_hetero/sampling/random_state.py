"""The global random states of a process: saved and restored, or separately seeded, independent of training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states


@dataclass(frozen=True, eq=False, repr=False)
class RandomState:
    """The global random states at one time: torch's for the CPU and the current CUDA device, numpy's, Python's."""

    states: dict[str, Any]
    cuda: torch.Tensor | None  # None where CUDA is not in use

    @classmethod
    def current(cls) -> "RandomState":
        """The current states."""
        # Lightning's helper would read the states of all CUDA devices, and so create a CUDA context on each of them.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(_collect_rng_states(include_cuda=False), cuda)

    @classmethod
    def seeded(cls, seed: int) -> "RandomState":
        """The states after seeding torch (CPU), numpy and Python; the process's own states do not change."""
        with _isolated():
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - samplers may draw from numpy's global generator
            random.seed(seed)
            return cls.current()

    def restore(self) -> None:
        """Make these the process's states."""
        _set_rng_states(self.states)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def _isolated() -> Iterator[None]:
    """Restore the process's random states afterwards, also after an error, where Lightning's `isolate_rng` does not."""
    before = RandomState.current()
    try:
        yield
    finally:
        before.restore()


class SeparateRandomState:
    """Separate global random states, from a seed, for whatever is drawn inside `active`.

    What a training step draws (dropout, augmentation) can't change what is drawn inside, nor the reverse.
    """

    def __init__(self, seed: int) -> None:
        self._state = RandomState.seeded(seed)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Continue from the end of the last such block; the process's own states are restored afterwards."""
        with _isolated():
            self._state.restore()
            try:
                yield
            finally:
                self._state = RandomState.current()
