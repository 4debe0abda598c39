"""Reports of ranks as messages contain them, for tests without messages."""

from collections.abc import Sequence

import numpy as np

from lightning_hetero.planning.planner import PlanUpdate, SplitPlanner
from lightning_hetero.planning.reports import MemoryReports, StepReports
from lightning_hetero.planning.shares import Shares


def memory_reports(*ranks: tuple[float, ...]) -> MemoryReports:
    """For each rank: local batch, peak, resting, fits, fails; omitted values are 0."""
    table = np.array([(*rank, *[0.0] * (5 - len(rank))) for rank in ranks], dtype=np.float64)  # (W, columns)
    return MemoryReports(*table.T)


def step_reports(
    step: int,
    measured: Sequence[int],
    seconds: Sequence[float],
    *,
    drawn: int | None = None,
    sync: Sequence[float] = (),
    after_backward: Sequence[bool] = (),
    memory: MemoryReports | None = None,
) -> StepReports:
    """Reports of W ranks; `drawn` defaults to the step itself."""
    ranks = len(measured)
    return StepReports(
        step,
        step if drawn is None else drawn,
        np.array(measured, dtype=np.int64),
        np.array(seconds, dtype=np.float64),
        np.array(sync or [0.0] * ranks, dtype=np.float64),
        np.array(after_backward or [False] * ranks),
        memory or memory_reports(*[(0.0,)] * ranks),
    )


def planner(shares: object, world_size: int, global_batch: int, **options: object) -> SplitPlanner:
    return SplitPlanner(Shares.parse(shares), world_size, global_batch, **options)


def take(planner: SplitPlanner, step: int, seconds: Sequence[float], **options: object) -> PlanUpdate:
    """Update a planner with a step that all ranks have measured."""
    return planner.update(step_reports(step, [step] * len(seconds), seconds, **options))
