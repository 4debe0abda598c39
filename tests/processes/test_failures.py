"""A rank that exits: whether the errors of the others are recognized as secondary, and their text."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from lightning_hetero.device.step_timer import ComputeTimer, HostClock
from lightning_hetero.exchange.failures import CollectiveErrors, explain, is_secondary_failure
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.exchange.store import default_store
from lightning_hetero.exchange.waits import Waits
from lightning_hetero.step.gradients import average_gradients, averaging_hook, masked_hook, timed_hook
from tests.ranks import fails_on_ranks, run_ranks

LOST = "Connection"
"""Part of gloo's message about a peer that has exited: closed, or reset."""


class Net(nn.Module):
    """Several gradient buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def waits_of(run: int) -> Waits:
    waits = Waits(dist.get_rank(), 2, "cpu", default_store(), timedelta(seconds=30))
    waits.begin_run(run)
    return waits


class Meeting:
    """A rank's part in a scenario; rank 1 ends where the scenario says so."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.rank = dist.get_rank()
        self.end = end
        self.errors = CollectiveErrors()
        self.waits = waits_of(3)
        self.group = RankGroup(self.rank, 2, timedelta(seconds=30), self.waits)

    def rank_1_ends(self) -> None:
        if self.rank == 1:
            self.end()


def backward(meeting: Meeting, *, hook: bool = True) -> None:
    """In the gradients' all-reduce, after a step that went well."""
    model = DistributedDataParallel(Net(), bucket_cap_mb=1e-4)
    if hook:  # as the strategy registers it
        averaging = masked_hook(averaging_hook(meeting.errors), lambda: None)
        model.register_comm_hook(None, timed_hook(averaging, ComputeTimer(HostClock()), may_wait=False))
    model(torch.ones(2, 8)).sum().backward()
    model(torch.ones(2, 8)).sum().backward()
    loss = model(torch.ones(2, 8)).sum()
    meeting.rank_1_ends()
    loss.backward()


def afterwards(meeting: Meeting) -> None:
    """In averaging after the backward pass."""
    module = Net()
    module(torch.ones(2, 8)).sum().backward()
    meeting.rank_1_ends()
    average_gradients(list(module.parameters()), meeting.group, "averaging")


def buffers(meeting: Meeting) -> None:
    """In DDP's copying of rank 0's buffers."""
    module = Net()
    module.register_buffer("seen", torch.zeros(1))
    model = DistributedDataParallel(module)
    meeting.rank_1_ends()
    model(torch.ones(2, 8))


def synchronized(meeting: Meeting) -> None:
    """In the backward pass of a layer that calls the other ranks by itself."""
    loss = Sums.apply(torch.ones(2, requires_grad=True)).sum()
    meeting.rank_1_ends()
    loss.backward()


class Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def table(meeting: Meeting) -> None:
    meeting.group.start([1.0]).wait()
    meeting.rank_1_ends()
    meeting.group.start([1.0]).wait()


def gather(meeting: Meeting) -> None:
    meeting.group.gather("a")
    meeting.rank_1_ends()
    meeting.group.gather("b")


def broadcast(meeting: Meeting) -> None:
    values = ["a"]
    dist.broadcast_object_list(values, src=1)
    meeting.rank_1_ends()
    dist.broadcast_object_list(values, src=1)


def barrier(meeting: Meeting) -> None:
    dist.barrier()
    meeting.rank_1_ends()
    dist.barrier()


def users_all_gather(meeting: Meeting) -> None:
    meeting.rank_1_ends()
    dist.all_gather([torch.ones(2), torch.ones(2)], torch.ones(2))


CALLS: dict[str, Callable[[Meeting], None]] = {
    "the gradients' all-reduce": backward,
    "averaging after the backward pass": afterwards,
    "rank 0's buffers": buffers,
    "a synchronized layer's backward": synchronized,
    "the messages of a step": table,
    "a gather": gather,
    "a broadcast": broadcast,
    "a barrier": barrier,
    "a user's all_gather": users_all_gather,
}


def fails(call: Callable[[Meeting], None], folder: str, *, publishes: bool) -> None:
    """Rank 0 records whether its exception is secondary, its text, and its text once explained."""

    def end() -> None:
        if publishes:
            explain(ArithmeticError("my own mistake"), meeting.waits, CollectiveErrors())
        os._exit(0)  # as a process does that is killed

    meeting = Meeting(end)
    with pytest.raises(RuntimeError) as caught:
        call(meeting)
    secondary, text = is_secondary_failure(caught.value, meeting.errors), str(caught.value)
    explain(caught.value, meeting.waits, meeting.errors)
    Path(folder, "seen").write_text(json.dumps([secondary, text, str(caught.value)]))


def seen_by_rank_0(folder: Path, call: Callable[[Meeting], None], *, publishes: bool) -> tuple[bool, str, str]:
    errors = fails_on_ranks(2, partial(fails, publishes=publishes), call, str(folder))
    assert set(errors) == {1}, errors
    secondary, text, explained = json.loads((folder / "seen").read_text())
    return secondary, " ".join(text.split()), explained


@pytest.mark.parametrize("name", CALLS)
def test_the_cause_is_named_and_the_own_text_is_kept(name: str, tmp_path: Path) -> None:
    """Wherever the other rank's end is noticed; in one line, which is the last one of a traceback."""
    secondary, text, explained = seen_by_rank_0(tmp_path, CALLS[name], publishes=True)
    assert secondary
    assert LOST in text
    cause = "rank 1 (cpu) failed first: ArithmeticError: my own mistake"
    assert explained == f"{cause} (rank 0 then lost the connection: {text})"


def test_a_rank_that_is_killed_has_published_nothing(tmp_path: Path) -> None:
    """Then no cause is made up."""
    secondary, text, explained = seen_by_rank_0(tmp_path, gather, publishes=False)
    assert secondary
    assert explained.startswith(
        "rank 1 (cpu) ended without saying why while rank 0 (cpu) was in a gathering of values; it may"
    )
    assert text in explained


def unrecorded(meeting: Meeting) -> None:
    backward(meeting, hook=False)


def test_without_the_hook_a_failed_all_reduce_can_not_be_told_from_a_users_mistake(tmp_path: Path) -> None:
    """Why the hook records it: autograd's engine raises both, in the same frame and of the same type.

    Then the exception stays as it is, and the other rank's failure is added to it.
    """
    secondary, text, explained = seen_by_rank_0(tmp_path, unrecorded, publishes=True)
    assert not secondary
    assert LOST in text
    assert " ".join(explained.split()) == text


class Breaks(torch.autograd.Function):
    """A user's own mistake in a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("nccl: the gloo of the igloo timed out, connection reset by peer")


class Slow(Dataset[Tensor]):
    """A user's own mistake in a loader's worker."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        raise RuntimeError("/data/igloo/tile.tif timed out, broken pipe")


def in_backward() -> None:
    model = DistributedDataParallel(Net())
    model.register_comm_hook(None, averaging_hook(CollectiveErrors()))
    Breaks.apply(model(torch.ones(2, 8))).sum().backward()


def in_a_worker() -> None:
    list(DataLoader(Slow(), num_workers=1))


def in_training_step() -> None:
    raise RuntimeError("DataLoader timed out after 30 seconds")


def changed_in_place() -> None:
    """An error of autograd's engine itself."""
    a = torch.ones(2, requires_grad=True)
    b = a.exp()
    b.add_(1)
    b.sum().backward()


MISTAKES: dict[str, Callable[[], None]] = {
    "in a backward pass": in_backward,
    "in a loader's worker": in_a_worker,
    "in training_step": in_training_step,
    "found by autograd": changed_in_place,
}


def mistakes() -> dict[str, tuple[bool, str, list[str]]]:
    """On rank 0, after rank 1 has published a failure of its own in every second run."""
    outcomes = {}
    for run, (name, mistake) in enumerate(MISTAKES.items()):
        errors = CollectiveErrors()
        with pytest.raises(RuntimeError) as caught:
            mistake()
        text = str(caught.value)
        if dist.get_rank() == 1 and run % 2:
            explain(ArithmeticError("first"), waits_of(run), errors)
        dist.barrier()
        if dist.get_rank() == 0:
            explain(caught.value, waits_of(run), errors)
        dist.barrier()
        kept = str(caught.value) == text
        notes = getattr(caught.value, "__notes__", [])
        outcomes[name] = is_secondary_failure(caught.value, errors), kept, notes
    return outcomes


def test_a_users_mistake_is_never_replaced() -> None:
    """Whatever its text, and also if another rank failed first; then a note says so."""
    of_rank_0 = run_ranks(2, mistakes)[0]
    for run, (name, (secondary, kept, notes)) in enumerate(of_rank_0.items()):
        assert not secondary, name
        assert kept, name
        assert notes == (["rank 1 (cpu) failed first: ArithmeticError: first"] if run % 2 else []), name
