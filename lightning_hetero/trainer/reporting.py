"""What a user sees of a run, in words: tables, sentences, and lines of JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.planning.plan import Plan


def device_name(device: torch.device) -> str:
    """A device as a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def table(plan: Plan, devices: Sequence[str], memory: Sequence[float] | None = None) -> str:
    """A plan as a table, one row a rank.

    Args:
        plan: what is shown.
        devices: W names.
        memory: W numbers of bytes, the most that each rank has held; None before anything is known.
    """
    rows = [("rank", "device", "samples/s", "share", "predicted", "memory")]
    for rank, (device, local_batch) in enumerate(zip(devices, plan.local_batches, strict=True)):
        seconds = plan.predicted_seconds[rank] if plan.predicted_seconds else None
        rows.append(
            (
                str(rank),
                device,
                f"{local_batch / seconds:.1f}" if seconds else "-",
                f"{local_batch} ({local_batch / plan.global_batch:.0%})",
                f"{seconds * 1000:.0f} ms" if seconds else "-",
                f"{memory[rank] / 2**30:.2f} GiB" if memory and memory[rank] > 0 else "-",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"hetero: global batch {plan.global_batch} from step {plan.first_step} on ({plan.reason})"
    return "\n".join([head, *lines])


def differs(split: Sequence[int], shown: Sequence[int]) -> bool:
    """Whether a split is worth a table after the one that was shown last: a share moves by more than noise does.

    Noise is one sample, or 2% of the global batch if that is more.
    """
    noise = max(1.0, 0.02 * sum(split))
    return any(abs(a - b) > noise for a, b in zip(split, shown, strict=True))


def duration(seconds: float) -> str:
    """Seconds to three figures, so that what differs by 2% looks different."""
    if seconds < 0.1:
        return f"{1000 * seconds:#.3g}".rstrip(".") + " ms"
    return f"{seconds:#.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def about(samples: int) -> int:
    """A predicted number to two figures, rounded up."""
    unit: int = 10 ** max(0, math.floor(math.log10(samples)) - 1)
    return -(-samples // unit) * unit


@dataclass(frozen=True)
class Outlook:
    """Which ranks do not pay.

    Args:
        global_batch: at which.
        seconds: predicted for a step of all ranks at the best split.
        without: predicted for a step of those that pay.
        pays_from: by rank, the global batch from which it would pay, or None for never; the worst rank first. Ranks
            that pay are not in it.
        farthest: the largest global batch that was looked at.
    """

    global_batch: int
    seconds: float
    without: float
    pays_from: Mapping[int, int | None]
    farthest: int

    def event(self, step: int) -> dict[str, Any]:
        """As a line of `plan.jsonl`."""
        return {
            "event": "outlook",
            "step": step,
            "global_batch": self.global_batch,
            "predicted_seconds": self.seconds,
            "predicted_seconds_without": self.without,
            "left_out": [{"rank": rank, "pays_from": first} for rank, first in self.pays_from.items()],
        }

    def sentence(self, devices: Sequence[str]) -> str | None:
        """For the log; None if all ranks pay.

        Args:
            devices: W names.
        """
        ranks = list(self.pays_from)
        if not ranks:
            return None
        named = [f"{rank} ({devices[rank]})" for rank in ranks]
        one = len(ranks) == 1
        instead = f"{duration(self.without)} instead of {duration(self.seconds)}"
        if one:
            first = self.pays_from[ranks[0]]
            then = f"from a global batch of about {about(first)} on it would" if first else self._never("it")
        else:
            whens = [
                f"rank {rank} would from about {about(first)} on" if first else self._never(f"rank {rank}")
                for rank, first in self.pays_from.items()
            ]
            then = ", ".join(whens)
        listed = named[0] if one else f"{', '.join(named[:-1])} and {named[-1]}"
        return (
            f"hetero: rank{'' if one else 's'} {listed} do{'es' if one else ''} not pay at a global batch of "
            f"{self.global_batch}: without {'it' if one else 'them'} a step would take {instead}; {then}"
        )

    def _never(self, who: str) -> str:
        return f"{who} would not at any up to {self.farthest}"


@dataclass(frozen=True)
class Ending:
    """What a run has come to.

    Args:
        split: W samples, of the last steps.
        seconds: of the last steps, median.
        first_seconds: of the steps at the split with which the run began, median; None if there were none, or the run
            has stayed there.
        began_equal: that split was the equal one.
        predicted_gain: how many times as fast as at an equal split the models say that it is; None without models.
        limit: samples a second of all devices, each alone with the whole global batch; None without models.
    """

    split: tuple[int, ...]
    seconds: float
    first_seconds: float | None = None
    began_equal: bool = True
    predicted_gain: float | None = None
    limit: float | None = None

    @property
    def samples_per_second(self) -> float:
        """Of the last steps."""
        return sum(self.split) / self.seconds

    def event(self, step: int) -> dict[str, Any]:
        """As a line of `plan.jsonl`."""
        return {
            "event": "end",
            "step": step,
            "local_batches": list(self.split),
            "step_seconds": self.seconds,
            "first_step_seconds": self.first_seconds,
            "equal_step_seconds": self.first_seconds if self.began_equal else None,
            "measured_gain": self.first_seconds / self.seconds if self.first_seconds and self.began_equal else None,
            "predicted_gain": self.predicted_gain,
            "samples_per_second": self.samples_per_second,
            "fraction_of_limit": self.samples_per_second / self.limit if self.limit else None,
        }

    def sentence(self) -> str | None:
        """For the log; None if nothing was learnt."""
        if self.predicted_gain is None or self.limit is None:
            return None
        gain = f"{self.predicted_gain:.2f} times as fast as an equal split by the models"
        if self.first_seconds:
            was = f"({duration(self.first_seconds)} before)"
            measured = "as measured" if self.began_equal else "as fast as at its first split as measured"
            gain = f"{gain}, {self.first_seconds / self.seconds:.2f} times {measured} {was}"
        return (
            f"hetero: a step took {duration(self.seconds)}, {gain}; {self.samples_per_second:.4g} samples/s are "
            f"{self.samples_per_second / self.limit:.0%} of the {self.limit:.4g} that all devices reach one by one"
        )


class PlanLog:
    """Writes `plan.jsonl`, one JSON object a line.

    Args:
        folder: the run's folder; the file is `hetero/plan.jsonl` in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "hetero" / "plan.jsonl"
        self._failed = False

    def write(self, plan: Plan) -> None:
        """Add a plan."""
        self.add(
            {
                "event": "plan",
                "step": plan.first_step,
                "local_batches": list(plan.local_batches),
                "predicted_seconds": list(plan.predicted_seconds or ()),
                "reason": plan.reason,
            }
        )

    def add(self, event: Mapping[str, Any]) -> None:
        """Add any event; a folder that can't be written to is said once, and does not end the training."""
        if self._failed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            self._failed = True
            rank_zero_warn(f"the plans of this run are not written down: {error}")
