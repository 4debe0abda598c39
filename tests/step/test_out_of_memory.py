"""A step whose batch does not fit is computed in parts, with the gradients of the whole; no Trainer takes part."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.step.out_of_memory import (
    MemoryBounds,
    OutOfMemoryRecovery,
    PartialStep,
    Passes,
    StepInParts,
    find_obstacle,
)
from lightning_hetero.step.out_of_memory.errors import RankOutOfMemoryError, explained, is_out_of_memory
from tests.ranks import run_ranks

DETAILS = "can't allocate memory: you tried to allocate 64 bytes"


class Limited(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(DETAILS)


class Net(nn.Module):
    """Runs out of memory with more than `fits` samples; keeps the sizes that were tried, and what was logged."""

    def __init__(self, fits: int, *, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 1, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(()))
        self.fits, self.where = fits, where
        self.tried: list[int] = []
        self.logged: list[float] = []
        self.is_logging = True

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:
        x, y = batch["x"], batch["y"]
        self.tried.append(len(x))
        self.seen += len(x)
        if len(x) > self.fits:
            if self.where == "forward":
                raise MemoryError(DETAILS)
            x = Limited.apply(x.clone().requires_grad_())
        out = self(x)
        valid = batch["valid"]
        loss = ((out - y) ** 2 * valid).sum() / valid.sum()  # NaN, as its gradients, where nothing is valid
        if self.is_logging:
            self.logged.append(float(loss.detach()))
        return {"loss": loss, "out": out}


def step_of(batch: Any, weight: float | Tensor = 1.0, count: Callable[[Any], float] | None = None) -> PartialStep:
    """A step whose loss count is the number of valid entries."""
    count = count or (lambda part: float(part["valid"].sum()))

    def count_of(part: Any, samples: int) -> float:
        assert len(part["x"]) == samples
        return count(part)

    return PartialStep(len(batch["x"]), lambda: weight, lambda: count(batch), count_of)


class Logs:
    """Collects what parts log."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, float]] = []

    def begin(self, batch: Any, samples: int) -> None:
        pass

    def keep(self, loss: Tensor, count: float) -> None:
        assert not loss.requires_grad
        self.parts.append((int(count), float(loss)))


class Logging:
    """Provides `Logs`."""

    def __init__(self) -> None:
        self.logs = Logs()

    @contextmanager
    def in_parts(self) -> Iterator[Logs]:
        yield self.logs


def batch_of(size: int, *, invalid: tuple[int, ...] = ()) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(size)
    valid = torch.ones(size, dtype=torch.bool)
    valid[list(invalid)] = False
    x, y = torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": y[:, 0], "valid": valid, "name": "patch"}


def recovery_of(net: Net, model: nn.Module | None, *, smallest: int = 1, accumulated: int = 1) -> OutOfMemoryRecovery:
    @contextmanager
    def without_logging() -> Iterator[None]:
        net.is_logging = False
        yield
        net.is_logging = True

    passes = Passes(net.training_step, lambda loss: loss / accumulated, Tensor.backward, without_logging)
    obstacle = find_obstacle(net, model, automatic_optimization=True, custom_hook=False)
    return OutOfMemoryRecovery(net, model, passes, "rank 0 (cpu)", smallest, obstacle)


def gradients_of(net: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def go(parts: StepInParts, logging: Logging, batch: Any, **options: Any) -> Tensor:
    """A whole step, as a Trainer makes it: forward, gradients of the last step cleared, backward."""
    output = parts.training_step(logging, batch, batch_idx=0)
    parts.backward(output["loss"], **options)
    return output


def in_parts(net: Net, step: PartialStep, batch: Any, *, too_large: bool = False, **options: Any) -> Any:
    """The step and its output, on the only rank of a group."""
    recovery = recovery_of(net, DistributedDataParallel(net), **options)
    assert recovery.can_recover()
    parts, logging = StepInParts(recovery, step, too_large=too_large), Logging()
    return parts, go(parts, logging, batch), logging.logs.parts


def whole(batch: Any, weight: float = 1.0) -> Any:
    net = Net(fits=1000)
    output = net.training_step(batch)
    (output["loss"] * weight).backward()
    return net, output


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The only rank of a group."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@settings(max_examples=30)  # each makes DDP's wrapper
@given(
    size=st.integers(1, 12),
    fits=st.integers(1, 12),
    where=st.sampled_from(["forward", "backward"]),
    too_large=st.booleans(),
    invalid=st.sets(st.integers(0, 11), max_size=8),
)
@example(size=4, fits=2, where="forward", too_large=False, invalid={0, 1})
@example(size=4, fits=2, where="backward", too_large=False, invalid={0, 1})
def test_parts_have_the_gradients_of_the_whole(
    size: int, fits: int, where: str, too_large: bool, invalid: set[int]
) -> None:
    """However the batch is cut, and even if the loss of a part without valid samples is NaN."""
    too_large = too_large and size > fits
    batch = batch_of(size, invalid=tuple(i for i in invalid if i < size - 1))
    net = Net(fits, where=where)
    parts, output, _ = in_parts(net, step_of(batch), batch, too_large=too_large)
    plain, expected = whole(batch)
    torch.testing.assert_close(gradients_of(net), gradients_of(plain), rtol=1e-12, atol=1e-12)
    assert output["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-12)
    torch.testing.assert_close(output["out"], expected["out"], rtol=1e-12, atol=1e-12)
    assert float(net.seen) == size, "buffers have seen each sample once"
    assert (parts.memory_bounds is not None) == (size > fits)
    if parts.memory_bounds is not None:
        assert parts.memory_bounds.fits <= fits
        assert parts.memory_bounds.fails is None or parts.memory_bounds.fails > fits
        assert parts.memory_bounds.fails is not None or too_large


def test_halves_are_tried_until_they_fit_and_nothing_is_tried_in_vain_twice() -> None:
    net, batch = Net(fits=3), batch_of(12)
    parts, _, logged = in_parts(net, step_of(batch), batch)
    assert net.tried == [12, 6, 3, 3, 3, 3]
    assert parts.memory_bounds == MemoryBounds(fits=3, fails=6)
    assert [count for count, _ in logged] == [3, 3, 3, 3]
    net = Net(fits=3)
    parts, _, _ = in_parts(net, step_of(batch_of(6)), batch_of(6), too_large=True)
    assert net.tried == [3, 3]
    assert parts.memory_bounds == MemoryBounds(fits=3, fails=None)


def test_what_is_logged_after_a_whole_forward_pass_is_not_logged_again() -> None:
    net, batch = Net(fits=3, where="backward"), batch_of(6)
    _, _, logged = in_parts(net, step_of(batch), batch)
    assert len(net.logged) == 1
    assert not logged


def test_counts_that_do_not_add_up_weigh_by_their_ratios() -> None:
    """Three parts of 2 samples that each count as much as the whole."""
    net, batch = Net(fits=2), batch_of(4)
    in_parts(net, step_of(batch, count=lambda _: 5.0), batch)
    torch.testing.assert_close(gradients_of(net), gradients_of(whole(batch)[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [lambda _: 0.0, lambda part: 1.0 if len(part["x"]) == 4 else 0.0])
def test_parts_that_count_nothing(count: Callable[[Any], float]) -> None:
    """Gradients are exact zeros, and the loss is the mean over samples; also if only the whole counts anything."""
    net, batch = Net(fits=2), batch_of(4)
    _, output, _ = in_parts(net, step_of(batch, count=count), batch)
    assert not gradients_of(net).any()
    assert output["loss"].item() == pytest.approx(whole(batch)[1]["loss"].item())


def test_the_weight_the_accumulation_and_earlier_gradients() -> None:
    """Two micro-batches of an optimizer step: the second one's gradients come on top of the first one's."""
    net, first, second = Net(fits=2), batch_of(4), batch_of(5)
    recovery = recovery_of(net, DistributedDataParallel(net), accumulated=2)
    for batch, weight in ((first, 0.5), (second, torch.tensor(3.0))):
        go(StepInParts(recovery, step_of(batch, weight), too_large=False), Logging(), batch)
    expected = gradients_of(whole(first, 0.5 / 2)[0]) + gradients_of(whole(second, 3.0 / 2)[0])
    torch.testing.assert_close(gradients_of(net), expected, rtol=1e-12, atol=1e-12)


def test_a_closure_that_is_called_twice() -> None:
    """As LBFGS does: the second time the batch is known to be too large, and the bounds found before are kept."""
    net, batch = Net(fits=2), batch_of(4)
    parts = StepInParts(recovery_of(net, DistributedDataParallel(net)), step_of(batch), too_large=False)
    for _ in range(2):
        net.zero_grad()
        go(parts, Logging(), batch)
        torch.testing.assert_close(gradients_of(net), gradients_of(whole(batch)[0]), rtol=1e-12, atol=1e-12)
    assert net.tried == [4, 2, 2, 2, 2]
    assert parts.memory_bounds == MemoryBounds(fits=2, fails=4)


def test_what_does_not_fit_at_all_says_so() -> None:
    net, batch = Net(fits=2), batch_of(6)
    with pytest.raises(
        RankOutOfMemoryError, match=r"^rank 0 \(cpu\) ran out of memory at a local batch of 6, and 3 of"
    ):
        in_parts(net, step_of(batch), batch, smallest=2)
    with pytest.raises(RankOutOfMemoryError, match="its batch can't be cut into parts: a tensor of shape"):
        in_parts(net, step_of(batch), batch | {"prior": torch.zeros(4)})


def test_other_errors_are_left_alone() -> None:
    net = Net(fits=9)
    with pytest.raises(KeyError):
        in_parts(net, step_of(batch_of(4)), {"x": batch_of(4)["x"]})


# ---- ranks that average their gradients afterwards ----


def on_ranks(sizes: tuple[int, ...], where: str) -> Tensor:
    """One step on the part of a batch that this rank computes; the second rank runs out of memory."""
    rank = dist.get_rank()
    start, batch = sum(sizes[:rank]), batch_of(sum(sizes))
    own = {k: v[start : start + sizes[rank]] if isinstance(v, Tensor) else v for k, v in batch.items()}
    net = Net(fits=2 if rank == 1 else 100, where=where)
    recovery = recovery_of(net, DistributedDataParallel(net))
    step = step_of(own, weight=len(sizes) * sizes[rank] / sum(sizes))

    def average(parameters: Any) -> None:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= len(sizes)

    parts, logging = StepInParts(recovery, step, too_large=False), Logging()
    output = parts.training_step(logging, own)
    loss = output["loss"] if parts.memory_bounds is not None else output["loss"] * step.weight()
    parts.backward(loss, output["loss"], average=average)
    return gradients_of(net)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_all_ranks_end_with_the_gradient_of_the_global_batch(where: str) -> None:
    expected = gradients_of(whole(batch_of(8))[0])
    for got in run_ranks(2, on_ranks, (3, 5), where):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---- whether steps can be repeated in parts, and errors ----


def ddp(net: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(net, **options)


@pytest.mark.parametrize(
    ("make", "options", "obstacle"),
    [
        (partial(nn.Linear, 2, 1), {}, None),
        (partial(nn.Linear, 2, 1), {"automatic_optimization": False}, "in manual optimization a step can't be"),
        (partial(nn.Linear, 2, 1), {"custom_hook": True}, "with a ddp_comm_hook of its own a step can't be"),
        (partial(nn.Embedding, 2, 1, sparse=True), {}, "with sparse gradients a step can't be"),
        (partial(nn.Linear, 2, 1), {"find_unused_parameters": True}, "with find_unused_parameters a step can't be"),
    ],
)
def test_obstacles(make: Callable[[], nn.Module], options: dict[str, Any], obstacle: str | None) -> None:
    module = make()
    given_to_ddp = {key: value for key, value in options.items() if key == "find_unused_parameters"}
    rest = {"automatic_optimization": True, "custom_hook": False} | {
        key: value for key, value in options.items() if key not in given_to_ddp
    }
    found = find_obstacle(module, ddp(module, **given_to_ddp), **rest)
    assert found is None if obstacle is None else str(found).startswith(obstacle)
    assert "this kind of wrapper" in str(find_obstacle(module, module, automatic_optimization=True, custom_hook=False))


def test_the_first_step_of_a_static_graph_can_not_recover() -> None:
    net = Net(fits=2)
    recovery = recovery_of(net, DistributedDataParallel(net, static_graph=True))
    assert recovery.obstacle is None
    assert not recovery.can_recover()
    for local_batch, risky, reason in (
        (None, True, "where the user shards a step can't be repeated in parts"),
        (6, True, "with static_graph the first step can't be repeated in parts"),
        (6, False, "it has computed as many samples in an earlier step"),
    ):
        with pytest.raises(RankOutOfMemoryError, match=reason), recovery.explained(local_batch, risky=risky):
            raise MemoryError


def test_an_explanation_names_place_reason_and_remedy_and_keeps_the_cause() -> None:
    original = RuntimeError(f"{DETAILS}\nmany lines\nof a stack")
    with (
        pytest.raises(RankOutOfMemoryError) as caught,
        explained("rank 2 (cpu)", 9, "again"),
        explained("rank 1 (cpu)", 6, "it is small"),
    ):
        raise original
    assert caught.value.__cause__ is original
    assert original.args == (f"{DETAILS}\nmany lines\nof a stack",), "the original stays what it was"
    text = str(caught.value)
    assert text.startswith("rank 1 (cpu) ran out of memory at a local batch of 6, and it is small; use a smaller")
    assert text.endswith(f"({DETAILS})")
    with pytest.raises(RankOutOfMemoryError, match=r"rank 1 ran out of memory, and .*\(no further details\)$"):  # noqa: SIM117
        with explained("rank 1", None, "it is small"):
            raise MemoryError
    with pytest.raises(ValueError, match="memory"), explained("rank 1", 6, "it is small"):
        raise ValueError("not enough memory of names")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_what_means_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError(str(error)))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"))
