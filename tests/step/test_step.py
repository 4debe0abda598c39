"""A training step without a Trainer: loss counts, loss weights, and side effects."""

import random
import warnings
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from lightning_hetero.device.step_timer import ComputeTimer, HostClock
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.exchange.messages import TRAINS, PendingMessages, StepMessage
from lightning_hetero.sampling.random_state import RandomState
from lightning_hetero.sampling.train_sampler import Share
from lightning_hetero.step.gradients import GradientMask
from lightning_hetero.step.loss_count import LossCounter
from lightning_hetero.step.step import LoadedBatch, LocalCount, Step, StepContext
from lightning_hetero.step.zero_count import ZeroCountWarning
from tests.ranks import run_ranks


def context_of(module: nn.Module, count: Any = None, group: RankGroup | None = None) -> StepContext:
    group = group or RankGroup(0, 1, None)
    return StepContext(
        module=module,
        counter=LossCounter("the rule", count),
        group=group,
        device=torch.device("cpu"),
        timer=ComputeTimer(HostClock()),
        mask=GradientMask(),
        zero_counts=ZeroCountWarning("the rule", group.rank),
        batch_norm_group=None,
    )


def share_of(*counts: int, borrowed: bool = False, state: RandomState | None = None) -> Share:
    return Share(5, counts, borrowed, 1, state)


def step_of(context: StepContext, share: Share | None, count: LocalCount, *, accumulates: bool = False) -> Step:
    samples = share.samples(context.group.rank) if share is not None else None
    loaded = LoadedBatch(5, share, samples, context.module)
    message = StepMessage(TRAINS, 5, loss_count=count.on_host, samples=1 if samples is None else samples)
    pending = PendingMessages(context.group, message)
    return Step(context, loaded, count, pending, accumulates=accumulates)


# ---- the batch ----


class Stateful(nn.Module):
    """Has all the state that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.metric = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.metric.update(x.sum())
        return nn.functional.dropout(self.norm(x), 0.5)

    def state(self) -> list[float]:
        state = [*self.norm.running_mean.tolist(), int(self.norm.num_batches_tracked)]
        return [*state, float(self.metric.mean_value), float(self.metric.weight), self.metric._update_count]


def draws() -> list[float]:
    return [float(torch.rand(1)), float(np.random.rand()), random.random()]


def test_borrowed_samples_leave_no_trace() -> None:
    """In buffers, in metrics, and in the random numbers that follow."""
    module = Stateful()
    module(torch.randn(4, 2))
    before, random_state = module.state(), RandomState.current()
    following = draws()
    random_state.restore()
    loaded = LoadedBatch(5, share_of(4, 0, borrowed=True), 0, module)
    assert loaded.borrowed
    for _ in range(3):
        module(torch.randn(4, 2))
        draws()
    assert module.state() != before
    loaded.undo_borrowed()
    assert module.state() == before
    assert draws() == following


def test_random_numbers_go_on_from_before_a_borrowed_batch_was_loaded() -> None:
    """Loading in the main process draws some too, before the step begins."""
    random_state = RandomState.current()
    following = draws()
    random_state.restore()
    draws()  # while the batch is loaded
    loaded = LoadedBatch(5, share_of(4, 0, borrowed=True, state=random_state), 0, nn.Linear(1, 1))
    draws()
    loaded.undo_borrowed()
    assert draws() == following


@pytest.mark.parametrize(("share", "samples"), [(share_of(1, 3), 3), (None, None)], ids=["own", "the user shards"])
def test_what_a_ranks_own_samples_change_stays(share: Share | None, samples: int | None) -> None:
    module = Stateful()
    loaded = LoadedBatch(5, share, samples, module)
    assert not loaded.borrowed
    module(torch.randn(4, 2))
    after, random_state = module.state(), RandomState.current()
    following = draws()
    random_state.restore()
    loaded.undo_borrowed()
    assert module.state() == after
    assert draws() == following


# ---- its count ----


def counted(rule: Any, share: Share | None, batch: Any) -> LocalCount:
    module = nn.Linear(1, 1)
    samples = share.samples(0) if share is not None else None
    return LocalCount.of(context_of(module, rule), batch, LoadedBatch(5, share, samples, module))


def test_a_count_is_what_the_rule_says_of_the_batch() -> None:
    for value in (3, 3.0, torch.tensor(3), torch.tensor(3.0, requires_grad=True)):
        count = counted(lambda _, batch, value=value: value, share_of(4, 2), torch.ones(4))
        assert (count.value, count.on_host, count.on_device, count.error) == (3.0, 3.0, None, None)
        assert type(count.value) is float
        assert (count.is_zero, count.is_positive) == (False, True)
    assert counted(lambda _, batch: 0, share_of(4, 2), torch.ones(4)).is_zero
    boxes = {"boxes": torch.ones(9, 4), "x": torch.ones(4)}
    assert counted(None, share_of(4, 2), boxes).value == 4.0, "tensors differ in length: the samples that were drawn"
    assert counted(None, None, torch.ones(7)).value == 7.0


def failing(*_: Any) -> float:
    raise KeyError("mask")


def test_borrowed_samples_are_not_counted() -> None:
    count = counted(failing, share_of(0, 4, borrowed=True), torch.ones(4))
    assert (count.value, count.error, count.is_zero, count.is_positive) == (0.0, None, True, False)


def test_an_error_of_counting_is_kept_for_the_messages() -> None:
    count = counted(failing, share_of(4, 2), torch.ones(4))
    assert isinstance(count.error, KeyError)
    assert np.isnan(count.on_host)


def test_a_count_that_only_the_device_knows_is_never_read() -> None:
    """`meta` tensors raise when they are read."""
    count = LocalCount(torch.tensor(2.0, device="meta"))
    assert (count.on_host, count.is_zero) == (1.0, False)
    assert count.on_device is count.value
    assert isinstance(count.is_positive, Tensor)


def failures() -> tuple[str, str]:
    """What this rank raises if rank 1's rule fails, and what a second call of `receive` does."""
    rank = dist.get_rank()
    group = RankGroup(rank, 2, timedelta(seconds=30))
    module = nn.Linear(1, 1)
    context = context_of(module, failing if rank else None, group)
    count = LocalCount.of(context, torch.ones(2), LoadedBatch(5, share_of(2, 2), 2, module))
    step = step_of(context, share_of(2, 2), count)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what is tested
        step.receive()
    return type(caught.value).__name__, str(caught.value)


def test_an_error_of_counting_ends_the_step_on_all_ranks() -> None:
    """That rank raises the error of the user's rule; the others name the rank."""
    other, own = run_ranks(2, failures)
    assert own == ("KeyError", "'mask'")
    assert other[0] == "ValueError"
    assert "the loss count of global batch 5 is nan on rank 1" in other[1]


# ---- its weight ----

COUNTS: dict[str, tuple[tuple[int, int] | None, tuple[float, float]]] = {
    "equal": ((2, 2), (2.0, 2.0)),
    "as samples": ((3, 1), (3.0, 1.0)),
    "unlike samples": ((3, 1), (2.0, 5.0)),
    "nothing on one rank": ((3, 1), (0.0, 5.0)),
    "nothing": ((3, 1), (0.0, 0.0)),
    "borrowed": ((4, 0), (4.0, 0.0)),
    "the user shards": (None, (2.0, 6.0)),
}


def weights() -> dict[str, Any]:
    rank = dist.get_rank()
    group = RankGroup(rank, 2, timedelta(seconds=30))
    found: dict[str, Any] = {}
    for name, (samples, counts) in COUNTS.items():
        share = share_of(*samples, borrowed=samples[rank] == 0) if samples is not None else None
        step = step_of(context_of(nn.Linear(1, 1), None, group), share, LocalCount(counts[rank]))
        before = (step.weight, step.logged_weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            messages = step.receive()
        assert before == (1.0, None)
        assert messages is not None
        assert messages.column("loss_count").tolist() == list(counts)
        assert step.receive() is None, "messages are received once"
        found[name] = (step.weight, step.logged_weight, [str(warning.message)[:27] for warning in caught])
    return found


def test_weights_follow_from_the_counts_of_all_ranks() -> None:
    """A loss is logged with its rank's samples as weight, or with one that gives the count-weighted mean."""
    ranks = run_ranks(2, weights)
    for name, (samples, counts) in COUNTS.items():
        total = sum(counts)
        for rank in range(2):
            weight, logged, warned = ranks[rank][name]
            assert weight == pytest.approx(2 * counts[rank] / total if total else 0.0)
            if samples is None:
                assert logged == counts[rank]
            elif samples == counts:
                assert logged is None
            else:
                assert logged == pytest.approx(sum(samples) * counts[rank] / total if total else 0.0)
            assert warned == (["nothing in global batch 5 c"] if not total and rank == 0 else [])


# ---- its gradients ----


class Masked(nn.Module):
    """The mean over valid entries: NaN, as are its gradients, where there are none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        each = self.second(self.first(x).tanh()).squeeze(-1).square()
        return (each * valid).sum() / valid.sum()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), torch.ones(6).double()


VALID = {
    "equal": (3, 3),
    "unequal": (3, 1),
    "nothing on rank 0": (0, 2),
    "nothing on rank 1": (1, 0),
    "nothing": (0, 0),
}


def part_of(rank: int, number: int) -> tuple[Tensor, Tensor]:
    """A rank's three samples, of which the first `number` are valid."""
    x, valid = data()
    valid = valid.clone()
    valid[3 * rank + number : 3 * rank + 3] = 0
    part = slice(3 * rank, 3 * rank + 3)
    return x[part], valid[part]


def gradients_of(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def trained() -> dict[str, Any]:
    """Gradients averaged during and after the backward pass, the loss of the global batch, and what was timed."""
    rank = dist.get_rank()
    group = RankGroup(rank, 2, timedelta(seconds=30))
    found: dict[str, Any] = {}
    warnings.filterwarnings("ignore", message="nothing in global batch")
    for name, numbers in VALID.items():
        x, valid = part_of(rank, numbers[rank])
        during, after = Masked(), Masked()
        model = DistributedDataParallel(during)
        contexts = [context_of(module, None, group) for module in (during, after)]
        steps = [step_of(context, share_of(3, 3), LocalCount(float(numbers[rank]))) for context in contexts]
        for context, step in zip(contexts, steps, strict=True):
            context.timer.start()
            step.receive()
        loss = model(x, valid)
        with steps[0].weighted(loss, averaged=True, keeps_gradients=False) as weighted:
            weighted.backward()
        with steps[1].weighted(after(x, valid), averaged=False, keeps_gradients=False) as weighted:
            weighted.backward()
            local = gradients_of(after).isfinite().all().item(), gradients_of(after).abs().sum().item()
            steps[1].average_after_backward(list(after.parameters()))
        part = steps[0].part_of_global_loss(loss)
        dist.all_reduce(part)
        timing = contexts[1].timer.stop()
        assert timing is not None
        found[name] = {
            "during": gradients_of(during),
            "after": gradients_of(after),
            "local": local,
            "loss": float(part) / 2,
            "is detached": not part.requires_grad,
            "sync": (len(timing.sync), timing.sync_seconds() > 0),
        }
    return found


def test_the_averaged_gradient_is_that_of_the_global_batch() -> None:
    """Averaged by DDP in the backward pass, or after one that was local; without NaN where a rank has nothing."""
    ranks = run_ranks(2, trained)
    for name, numbers in VALID.items():
        whole = Masked()
        parts = [part_of(rank, numbers[rank]) for rank in range(2)]
        loss = whole(torch.cat([x for x, _ in parts]), torch.cat([valid for _, valid in parts]))
        if sum(numbers):
            loss.backward()
            expected, mean = gradients_of(whole), float(loss.detach())
        else:
            expected, mean = torch.zeros_like(torch.cat([p.flatten() for p in whole.parameters()])), 0.0
        for rank, found in enumerate(ranks):
            for when in ("during", "after"):
                torch.testing.assert_close(found[name][when], expected, rtol=1e-13, atol=1e-15)
            finite, total = found[name]["local"]
            assert finite
            assert (total == 0) == (numbers[rank] == 0), "exact zeros of a rank of which nothing counts"
            assert found[name]["loss"] == pytest.approx(mean, rel=1e-13)
            assert found[name]["is detached"]
            assert found[name]["sync"] == (1, True), "the averages are waited for, which is no compute time"


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_gradients_that_only_the_device_knows_to_count_nothing(
    counts: bool, averaged: bool, keeps_gradients: bool, accumulates: bool
) -> None:
    """A mask of DDP's buckets, unless they hold gradients of earlier passes; else hooks on each gradient."""
    module = nn.Linear(2, 1, bias=False)
    context = context_of(module)
    step = step_of(context, share_of(2), LocalCount(torch.tensor(float(counts))), accumulates=accumulates)
    step.receive()
    module.weight.grad = torch.ones_like(module.weight)
    loss = module(torch.full((2, 2), 3.0 if counts else float("nan"))).mean()
    with step.weighted(loss, averaged=averaged, keeps_gradients=keeps_gradients) as weighted:
        mask = context.mask.current()
        weighted.backward()
    masked = averaged and not keeps_gradients and not accumulates
    assert (mask is not None) == masked
    assert context.mask.current() is None
    if mask is not None:
        assert bool(mask) == counts
    else:
        assert module.weight.grad.tolist() == [[4.0, 4.0] if counts else [1.0, 1.0]]


def test_a_backward_pass_that_raises_leaves_no_hook_and_no_mask() -> None:
    module = nn.Linear(2, 1)
    context = context_of(module)
    for value in (0.0, torch.tensor(0.0)):
        step = step_of(context, share_of(2), LocalCount(value))
        with pytest.raises(ArithmeticError), step.weighted(torch.ones(()), averaged=True, keeps_gradients=False):
            raise ArithmeticError
    assert context.mask.current() is None
    module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad.tolist() == [[1.0, 1.0]]


def test_the_weight_of_plain_equal_batches_leaves_the_loss_alone() -> None:
    """Not even a multiplication by one is added to the graph."""
    step = step_of(context_of(nn.Linear(1, 1)), share_of(2), LocalCount(2.0))
    step.receive()
    loss = torch.ones((), requires_grad=True)
    with step.weighted(loss, averaged=True, keeps_gradients=False) as weighted:
        assert weighted is loss
