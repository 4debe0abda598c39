"""Running out of memory: a rank computes the batch of a step in parts, or the error says why it can't.

A fit needs `OutOfMemoryRecovery`, `StepInParts` and `PartialStep`; may import what `step` may.
"""

from lightning_hetero.step.out_of_memory.errors import RankOutOfMemoryError
from lightning_hetero.step.out_of_memory.recovery import (
    MemoryFound,
    OutOfMemoryRecovery,
    PartialStep,
    Passes,
    StepInParts,
    find_obstacle,
)

__all__ = [
    "MemoryFound",
    "OutOfMemoryRecovery",
    "PartialStep",
    "Passes",
    "RankOutOfMemoryError",
    "StepInParts",
    "find_obstacle",
]
