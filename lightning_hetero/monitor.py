"""What a user sees of the plans: a table in the log, and a line of JSON for each."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_hetero.plan import Plan


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


class PlanLog:
    """Writes `plan.jsonl`, one JSON object a line.

    Args:
        folder: the run's folder; the file is `hetero/plan.jsonl` in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "hetero" / "plan.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, plan: Plan) -> None:
        """Add a plan."""
        event = {
            "event": "plan",
            "step": plan.first_step,
            "local_batches": list(plan.local_batches),
            "predicted_seconds": list(plan.predicted_seconds or ()),
            "reason": plan.reason,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
