"""Computes figures from what the ranks recorded, and makes tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from lightning_hetero.demo.comparison import Job, Record, Side, Turn
from lightning_hetero.demo.scene import Patch
from lightning_hetero.demo.stopwatch import StepTime


@dataclass(frozen=True)
class RankFigures:
    """The figures of one rank on one side.

    Args:
        share: patches of a global batch; the median if it changed.
        images_per_second: over the time in which it did not wait for others.
        idle: the fraction of the time in which it waited for others.
        core: the fraction of its core that it got while it had work to do; None where unknown.
    """

    share: int
    images_per_second: float
    idle: float
    core: float | None

    @classmethod
    def of(cls, steps: Sequence[StepTime]) -> "RankFigures":
        """Compute them from the compared steps."""
        seconds, idle = sum(step.seconds for step in steps), sum(step.idle for step in steps)
        busy = seconds - idle
        computing = [step.computing for step in steps if step.computing is not None]
        return cls(
            share=round(median(len(step.patches) for step in steps)),
            images_per_second=sum(len(step.patches) for step in steps) / busy,
            idle=idle / seconds,
            core=sum(computing) / busy if computing else None,
        )


@dataclass(frozen=True)
class SideFigures:
    """The figures of one side of the comparison.

    Args:
        images_per_second: the global batch by the median time of a step.
        steps: how many were compared.
        idle: the fraction of the time in which ranks waited for others, over all of its ranks.
        ranks: the figures of those that took part.
        same_batches: of the first `batches` global batches, how many are those of the fast device alone.
        batches: how many steps a turn has.
        weights: distance of the weights after a turn from those of the fast device alone, relative to their norm.
    """

    images_per_second: float
    steps: int
    idle: float
    ranks: tuple[RankFigures, ...]
    same_batches: int
    batches: int
    weights: float


def global_batches(turns: Sequence[Turn], steps: int) -> list[list[Patch]]:
    """The patches of the first global batches, joined from the ranks' local batches.

    Args:
        turns: one per rank.
        steps: how many global batches.
    """
    return [sorted(patch for turn in turns for patch in turn.all_steps[step].patches) for step in range(steps)]


def side_figures(records: Sequence[Record], side: Side, job: Job) -> SideFigures:
    """The figures of one side, compared with the fast device alone.

    Args:
        records: of the ranks; the first has the turns of the fast device alone, too.
        side: which one.
        job: see `Job`.
    """
    by_rank = [record.turns[side] for record in records if side in record.turns]
    compared = [[step for turn in turns for step in turn.steps] for turns in by_rank]
    ranks = tuple(RankFigures.of(steps) for steps in compared)
    first, alone = [turns[0] for turns in by_rank], records[0].turns["alone"][0]
    batches = job.schedule.warm_up + job.schedule.steps
    pairs = zip(global_batches(first, batches), global_batches([alone], batches), strict=True)
    return SideFigures(
        # The ranks end each step together, so rank 0's time is that of all.
        images_per_second=job.recipe.global_batch / median(step.seconds for step in compared[0]),
        steps=len(compared[0]),
        idle=float(np.mean([rank.idle for rank in ranks])),
        ranks=ranks,
        same_batches=sum(ours == theirs for ours, theirs in pairs),
        batches=batches,
        weights=float(np.linalg.norm(first[0].weights - alone.weights) / np.linalg.norm(alone.weights)),
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned text; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(f"  {line}" for line in lines)


def rank_table(figures: SideFigures, devices: Sequence[str]) -> str:
    """A table with one row per rank."""
    rows = [("rank", "device", "share", "samples/s", "idle", "gets of its core")]
    total = sum(rank.share for rank in figures.ranks)
    for number, (rank, device) in enumerate(zip(figures.ranks, devices, strict=True)):
        core = "-" if rank.core is None else f"{rank.core:.0%}"
        share = f"{rank.share} ({rank.share / total:.0%})"
        rows.append((str(number), device, share, f"{rank.images_per_second:.0f}", f"{rank.idle:.0%}", core))
    return table(rows)


def comparison_table(sides: dict[Side, SideFigures]) -> str:
    """A table with one row per side."""
    rows = [("", "images/s", "× plain DDP", "idle", "local batches", "global batches as on one device")]
    for side, figures in sides.items():
        same = "-" if side == "alone" else f"{figures.same_batches} of {figures.batches}"
        rows.append(
            (
                "the fast device alone" if side == "alone" else side,
                f"{figures.images_per_second:.1f}",
                f"{figures.images_per_second / sides['plain DDP'].images_per_second:.2f}",
                "-" if side == "alone" else f"{figures.idle:.0%}",
                " + ".join(str(rank.share) for rank in figures.ranks),
                same,
            )
        )
    return table(rows)
