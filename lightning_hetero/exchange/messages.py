"""The message that each rank sends at every step, and all ranks' messages together."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.exchange.calls import Call
from lightning_hetero.exchange.groups import PendingRows, RankGroup
from lightning_hetero.planning.reports import MemoryReports, StepReports

TRAINS, LEFT_EPOCH, FETCHES, ASKS_TO_STOP, CHANGES, ASKS_TO_LOG = range(6)
"""Kinds of messages: what a rank is about to do, or has done, when it sends its message.

A rank that asks to stop, or to exchange logged values, sends this in place of its next message: see `PendingMessages`.
"""

_ASKING = (ASKS_TO_STOP, ASKS_TO_LOG)


@dataclass(frozen=True)
class StepMessage:
    """One rank's message in a step; all fields are numbers, so that messages are exchanged as rows of one table."""

    kind: float  # one of the above; `FETCHES` if ranks report measurements before they fetch a batch
    step: float  # the global batch at which the rank is
    loss_count: float = 1.0  # of its batch; 1 on CUDA, where the host does not know it
    plan_checksum: float = 0.0  # of the plan in force
    last_drawn: float = -1.0  # the last step that its loaders have drawn
    measured_step: float = -1.0  # the step that the next three fields belong to; -1 for none
    compute_seconds: float = 0.0
    sync_seconds: float = 0.0  # from its last local gradient to the averaged ones; 0 for unknown
    averaged_after_backward: float = 0.0  # whether gradients were averaged after the backward pass, not during it
    peak_memory: float = 0.0  # peak bytes in the rank's last step; 0 for unknown
    content_hash: float = 0.0  # of the data of one of the first batches; 0 if it is not compared
    stop_requested: float = 0.0  # whether the rank has been asked to stop, by a signal
    should_stop: float = 0.0  # whether `trainer.should_stop` was set on the rank
    local_batch: float = 0.0  # of its last step, if that was computed in one piece; else 0
    resting_memory: float = 0.0  # bytes held before the rank's first step
    fits: float = 0.0  # the largest local batch known to fit, once memory has run out; 0 if it never did
    fails: float = 0.0  # the smallest local batch known not to fit; 0 if memory never ran out
    input_shape: float = 0.0  # checksum of the shape of its samples; 0 for unknown
    trainable: float = 0.0  # checksum of the parameters that train; 0 if it does not train now
    samples: float = 1.0  # of its own in its batch; 0 if they are borrowed, 1 if their number is not known

    def row(self) -> tuple[float, ...]:
        return tuple(map(float, astuple(self)))


_COLUMNS = {field.name: number for number, field in enumerate(fields(StepMessage))}


class PendingMessages:
    """A rank's message, and those of all ranks, which are still being exchanged.

    Where a rank asks something, the others don't know of it and have sent their next message. Only if all ask, they
    act at once. Otherwise those that did not ask send their message again, together with the next one of those that
    did: so nobody sends anything more in a step in which nobody asks.

    Args:
        group: of all ranks.
        message: of this rank.
        logged: numbers that are sent along, see `StepMessages.logged`.
    """

    def __init__(self, group: RankGroup, message: StepMessage, logged: Sequence[float] = ()) -> None:
        self._group = group
        self._message = message
        self._logged = logged
        self._received: StepMessages | None = None
        self._pending = self._start()

    def _start(self) -> PendingRows:
        place = _place(self._message.kind, self._message.step)
        return self._group.start([*self._message.row(), *self._logged], Call("messages", place))

    def receive_once(self) -> "StepMessages | None":
        """The same as `receive`; but None if a rank asks something, as the others may answer only later in the step."""
        if self._received is None:
            messages = StepMessages(self._pending.wait())
            asking = np.isin(messages.column("kind"), _ASKING)
            if asking.all() or not asking.any() or self._message.kind in _ASKING:
                self._received = messages
            else:
                self._pending = self._start()
        return self._received

    def receive(self) -> "StepMessages":
        """The messages of all ranks; waits for the slowest one. See `PendingRows.wait` for errors."""
        while (messages := self.receive_once()) is None:
            pass
        return messages


def all_ask(group: RankGroup, kind: int, step: int) -> bool:
    """Whether all ranks ask the same, in between two steps; if not, those that don't have begun with `step`."""
    return bool((PendingMessages(group, StepMessage(kind, step)).receive().column("kind") == kind).all())


@dataclass(frozen=True)
class StepMessages:
    """All ranks' messages of one step."""

    table: NDArray[np.float64]  # their rows, (W, columns)

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of `StepMessage` on all ranks, (W,)."""
        values: NDArray[np.float64] = self.table[:, _COLUMNS[name]]  # (W, columns) -> (W,)
        return values

    @property
    def logged(self) -> NDArray[np.float64]:
        """What is sent along with the messages: values that were logged in earlier steps, (W, columns)."""
        return self.table[:, len(_COLUMNS) :]

    @property
    def step(self) -> int:
        """The global batch at which the ranks are; valid once `check` has found it to be the same on all ranks."""
        return int(self.column("step")[0])

    def reports(self) -> StepReports:
        """The part of the messages that planning uses."""
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
        """Check that all ranks are at the same step with the same plan, and that their loss counts are valid.

        Raises:
            RuntimeError: a rank alone has left the epoch or skipped a batch, or has a different plan.
            ValueError: a loss count is negative or not finite.
        """
        positions = list(zip(self.column("kind"), self.column("step"), strict=True))
        if len(set(positions)) > 1:
            places = "; ".join(f"rank {rank} is in {_place(*position)}" for rank, position in enumerate(positions))
            raise RuntimeError(
                f"the ranks went different ways: {places}. Every rank has to train on every global batch: make "
                "on_train_batch_start and the loader decide the same on all ranks."
            )
        if len(set(self.column("plan_checksum"))) > 1:
            raise RuntimeError(f"the ranks split global batch {self.step} differently; this is a bug in planning")
        counts = enumerate(self.column("loss_count"))
        wrong = ", ".join(f"{count:g} on rank {rank}" for rank, count in counts if not 0 <= count < np.inf)
        if wrong:
            raise ValueError(
                f"the loss count of global batch {self.step} is {wrong}; it has to be finite and at least 0"
            )


def _place(kind: float, step: float) -> str:
    if kind == LEFT_EPOCH:
        return f"the end of the epoch, after global batch {int(step) - 1}"
    if kind == ASKS_TO_LOG:
        return f"an exchange of newly logged values before global batch {int(step)}"
    if kind == ASKS_TO_STOP:
        return f"should_stop before global batch {int(step)}"
    if kind == CHANGES:
        return f"a change of the parameters that train, by training_step of global batch {int(step)}"
    return f"{'fetching' if kind == FETCHES else 'the training step of'} global batch {int(step)}"
