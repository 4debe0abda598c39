"""The state that a sampler keeps by itself, within a pass and from pass to pass: saved and restored."""

import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

_Access = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Reads a copy of a part of the state, and writes it back."""


class SamplerState:
    """A copy of what drawing from a sampler may change in it, and in samplers that are its attributes.

    It is the states of generators (torch's, numpy's, Python's), attributes that are assigned, and lists, dictionaries
    and one-dimensional arrays that are changed in place. Other objects are not looked into.
    """

    def __init__(self, sampler: object) -> None:
        parts = list(_samplers(sampler))
        values = [value for part in parts for value in vars(part).values()]
        self.generators = [value for value in values if isinstance(value, torch.Generator)]
        """torch's generators that are attributes of the samplers."""
        accesses = [_access(value) for value in (*map(vars, parts), *values)]
        self._saved = [(access, access[0]()) for access in accesses if access is not None]

    def restore(self) -> bool:
        """Restore the saved state; returns whether it had changed."""
        changed = [(write, value) for (read, write), value in self._saved if not _same(read(), value)]
        for write, value in changed:
            write(value)
        return bool(changed)


def _samplers(sampler: object) -> Iterator[object]:
    if hasattr(sampler, "__dict__"):
        yield sampler
        for value in vars(sampler).values():
            if isinstance(value, Sampler):
                yield from _samplers(value)


def _access(value: Any) -> _Access | None:  # noqa: PLR0911 - a table of types
    """How to read and write what may change inside an object; None for an object of another type."""
    match value:
        case dict():
            return value.copy, partial(_assign, value)
        case list():
            return value.copy, partial(value.__setitem__, slice(None))
        case np.ndarray(ndim=1):
            return value.copy, partial(value.__setitem__, slice(None))
        case torch.Generator():
            return (lambda: value.get_state().numpy()), (lambda state: value.set_state(torch.from_numpy(state)))
        case np.random.Generator():
            return _access(value.bit_generator)
        case np.random.BitGenerator():
            return (lambda: (value.state,)), (lambda state: setattr(value, "state", *state))
        case np.random.RandomState():
            return value.get_state, value.set_state
        case random.Random() if not isinstance(value, random.SystemRandom):
            return value.getstate, value.setstate
    return None


def _assign(mapping: dict[Any, Any], values: dict[Any, Any]) -> None:
    mapping.clear()
    mapping.update(values)


def _same(state: Any, other: Any) -> bool:
    """Whether two copies are equal: containers by the identity of their entries, which may be of any type."""
    if isinstance(state, dict):
        return list(state) == list(other) and all(map(is_, state.values(), other.values()))
    if isinstance(state, list):
        return len(state) == len(other) and all(map(is_, state, other))
    return pickle.dumps(state) == pickle.dumps(other)
