"""The global random states of a process: saved and restored, or seeded and separate from what training draws."""

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
    """The global random states at one moment: torch on the CPU and on the current CUDA device, numpy, Python."""

    states: dict[str, Any]
    cuda: torch.Tensor | None  # None where CUDA is not in use

    @classmethod
    def current(cls) -> "RandomState":
        """The states now."""
        # Lightning's helper would read the states of all CUDA devices, and so start to use each of them.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(_collect_rng_states(include_cuda=False), cuda)

    @classmethod
    def seeded(cls, seed: int) -> "RandomState":
        """The states after seeding torch (on the CPU), numpy and Python; those of the process do not change."""
        with _put_back():
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - samplers may draw from numpy's global generator
            random.seed(seed)
            return cls.current()

    def restore(self) -> None:
        """Put the states back."""
        _set_rng_states(self.states)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def _put_back() -> Iterator[None]:
    """What is drawn inside leaves no trace, also if an error is raised: then Lightning's `isolate_rng` does."""
    before = RandomState.current()
    try:
        yield
    finally:
        before.restore()


class SeparateRandomState:
    """Separate global random states, from a seed, for whatever is drawn inside `active`.

    Nothing that a training step draws (dropout, augmentation) can change what is drawn inside, and the reverse.
    """

    def __init__(self, seed: int) -> None:
        self._state = RandomState.seeded(seed)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Continue where the last such block ended; outside, everything is as it was."""
        with _put_back():
            self._state.restore()
            try:
                yield
            finally:
                self._state = RandomState.current()
