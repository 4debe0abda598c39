"""Running out of memory: a rank computes the batch of a step in parts, or the error says why it can't.

A fit uses `OutOfMemoryRecovery`, `StepInParts` and `PartialStep`. May import the same as `step`.
"""

from lightning_hetero.step.out_of_memory.errors import RankOutOfMemoryError, explained
from lightning_hetero.step.out_of_memory.recovery import (
    MemoryBounds,
    OutOfMemoryRecovery,
    PartialStep,
    Passes,
    StepInParts,
    find_obstacle,
)

__all__ = [
    "MemoryBounds",
    "OutOfMemoryRecovery",
    "PartialStep",
    "Passes",
    "RankOutOfMemoryError",
    "StepInParts",
    "explained",
    "find_obstacle",
]
