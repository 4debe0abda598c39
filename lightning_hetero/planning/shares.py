"""The option `shares`, parsed once: adaptive or fixed, proportions, a profile to start from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shares:
    """How global batches are to be split."""

    adaptive: bool  # the split follows what is measured
    proportions: tuple[float, ...] | None = None
    """One number per rank, each at least 0 and not all 0; only their ratios matter. None if the user gave none."""
    profile: str | None = None  # path of the profile that the user named

    @classmethod
    def parse(cls, value: str | Sequence[float] | NDArray[Any]) -> Self:
        """Parse "auto", "equal", one number per rank, or the path of a profile (``….json``) to start from.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, str):
            profile = value if value.endswith(".json") else None
            if value not in ("auto", "equal") and profile is None:
                raise ValueError(
                    f"shares={value!r} is unknown: use 'auto', 'equal', one number per rank such as [4, 1], or the "
                    "path of a profile.json"
                )
            return cls(adaptive=value != "equal", profile=profile)
        try:
            proportions = tuple(float(share) for share in value)
        except (TypeError, ValueError):
            raise ValueError(
                f"shares={value!r} has to be 'auto', 'equal', or one number per rank such as [4, 1]"
            ) from None
        for rank, share in enumerate(proportions):
            if not math.isfinite(share) or share < 0:
                raise ValueError(
                    f"shares={_listed(proportions)}: the share of rank {rank} is {share:g}; give a number of 0 or more"
                )
        if sum(proportions) <= 0:
            raise ValueError(f"shares={_listed(proportions)} add up to 0; at least one rank needs a share above 0")
        return cls(adaptive=False, proportions=proportions)

    def check_world_size(self, world_size: int) -> None:
        """Raise a ValueError if there are numbers, but not one per rank."""
        if self.proportions is None or (numbers := len(self.proportions)) == world_size:
            return
        raise ValueError(
            f"shares={_listed(self.proportions)} has {numbers} number{'s' if numbers != 1 else ''}, but there "
            f"{'are' if world_size != 1 else 'is'} {world_size} rank{'s' if world_size != 1 else ''}: give one per rank"
        )

    def proportions_for(self, world_size: int) -> tuple[float, ...]:
        """W numbers: the user's, or ones; raises like `check_world_size`."""
        self.check_world_size(world_size)
        return self.proportions or (1.0,) * world_size


def _listed(proportions: Sequence[float]) -> str:
    return f"[{', '.join(f'{share:g}' for share in proportions)}]"
