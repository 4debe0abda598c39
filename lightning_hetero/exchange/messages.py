"""The message that each rank sends at every step, and all ranks' messages together."""

from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.planning.reports import MemoryReports, StepReports

TRAINS, LEFT_EPOCH, FETCHES = 0, 1, 2
"""What a rank is about to do when it sends its message."""


@dataclass(frozen=True)
class StepMessage:
    """One rank's message in a step; all numbers, so that it travels as a row of one table.

    Args:
        kind: `TRAINS`, `LEFT_EPOCH`, or `FETCHES` where ranks report what they have measured before they fetch a batch.
        step: the global batch that the rank is at.
        loss_count: of its batch; not known to the host on CUDA, where 1 stands for it.
        plan_checksum: of the plan in force.
        last_drawn: the last step that its loaders have handed out.
        measured_step: the step that the following three belong to; -1 for none.
        compute_seconds: its compute time in that step.
        sync_seconds: from its last local gradient to the averaged ones in that step; 0 for unknown.
        averaged_after_backward: whether gradients were averaged after the backward pass in that step, not during it.
        peak_memory: most bytes that the rank held in its last step; 0 if not known.
        content_hash: a number that stands for the data of one of the first batches, where ranks might train on the same
            data; 0 otherwise.
        stop_requested: whether the rank has been asked to stop.
        local_batch: of its last step, computed in one piece; 0 where it was not.
        resting_memory: bytes that it held before its first step.
        fits: the largest local batch that is known to fit, after memory has run out; 0 if it never did.
        fails: the smallest one that is known not to; 0 if memory never ran out.
        input_shape: a number that stands for the shape of its samples; 0 for unknown.
    """

    kind: float
    step: float
    loss_count: float = 1.0
    plan_checksum: float = 0.0
    last_drawn: float = -1.0
    measured_step: float = -1.0
    compute_seconds: float = 0.0
    sync_seconds: float = 0.0
    averaged_after_backward: float = 0.0
    peak_memory: float = 0.0
    content_hash: float = 0.0
    stop_requested: float = 0.0
    local_batch: float = 0.0
    resting_memory: float = 0.0
    fits: float = 0.0
    fails: float = 0.0
    input_shape: float = 0.0

    def row(self) -> tuple[float, ...]:
        """The numbers, in the order of the fields."""
        return tuple(map(float, astuple(self)))


_COLUMNS = {field.name: number for number, field in enumerate(fields(StepMessage))}


@dataclass(frozen=True)
class StepMessages:
    """All ranks' messages of one step.

    Args:
        table: their rows, (W, columns).
    """

    table: NDArray[np.float64]

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of `StepMessage`, (W,)."""
        values: NDArray[np.float64] = self.table[:, _COLUMNS[name]]  # (W, columns) -> (W,)
        return values

    @property
    def step(self) -> int:
        """The global batch that the ranks are at, once `check` has found it to be the same on all."""
        return int(self.column("step")[0])

    @property
    def kinds(self) -> NDArray[np.float64]:
        """What each rank is about to do, (W,)."""
        return self.column("kind")

    @property
    def loss_counts(self) -> NDArray[np.float64]:
        """(W,)."""
        return self.column("loss_count")

    @property
    def content_hashes(self) -> NDArray[np.float64]:
        """Numbers that stand for the ranks' data, 0 for none, (W,)."""
        return self.column("content_hash")

    @property
    def stop_requested(self) -> NDArray[np.bool_]:
        """Whether each rank has been asked to stop, (W,)."""
        return self.column("stop_requested") > 0

    @property
    def input_shapes(self) -> NDArray[np.float64]:
        """Numbers that stand for the shapes of samples, 0 for unknown, (W,)."""
        return self.column("input_shape")

    @property
    def local_batches(self) -> NDArray[np.int64]:
        """Of each rank's last step, computed in one piece; 0 where it was not, (W,)."""
        return self.column("local_batch").astype(np.int64)

    def reports(self) -> StepReports:
        """What plans are made of."""
        return StepReports(
            step=self.step,
            last_drawn=int(self.column("last_drawn").max()),
            measured_steps=self.column("measured_step").astype(np.int64),
            compute_seconds=self.column("compute_seconds"),
            sync_seconds=self.column("sync_seconds"),
            averaged_after_backward=self.column("averaged_after_backward") > 0,
            memory=MemoryReports(
                local_batches=self.column("local_batch"),
                peaks=self.column("peak_memory"),
                resting=self.column("resting_memory"),
                fits=self.column("fits"),
                fails=self.column("fails"),
            ),
        )

    def check(self) -> None:
        """See that all ranks are at the same place with the same plan, and have counts that can be weighted.

        Raises:
            RuntimeError: a rank left the epoch or skipped a batch by itself, or its plan is another one.
            ValueError: a loss count is negative or not finite.
        """
        steps = self.column("step")
        if len(set(self.kinds)) > 1 or len(set(steps)) > 1:
            places = "; ".join(_place(rank, *pair) for rank, pair in enumerate(zip(self.kinds, steps, strict=True)))
            raise RuntimeError(
                f"the ranks went different ways: {places}. Every rank has to train on every global batch: let "
                "on_train_batch_start, the loader and should_stop decide alike on all ranks."
            )
        if len(set(self.column("plan_checksum"))) > 1:
            raise RuntimeError(f"the ranks split global batch {self.step} differently; this is a fault of the plan")
        counts = self.loss_counts
        wrong = [rank for rank, count in enumerate(counts) if not np.isfinite(count) or count < 0]
        if wrong:
            listed = ", ".join(f"{counts[rank]:g} on rank {rank}" for rank in wrong)
            raise ValueError(
                f"the loss count of global batch {self.step} is {listed}; it has to be finite and at least 0"
            )


def _place(rank: int, kind: float, step: float) -> str:
    if kind == LEFT_EPOCH:
        return f"rank {rank} left the epoch after global batch {int(step) - 1}"
    if kind == FETCHES:
        return f"rank {rank} fetches global batch {int(step)}"
    return f"rank {rank} trains on global batch {int(step)}"
