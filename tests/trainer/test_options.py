"""The strategy's options, checked one by one; no process is started for it."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_hetero.planning.shares import Shares
from lightning_hetero.trainer import options as module
from lightning_hetero.trainer.options import Options, check_devices, check_trainable


def options_of(**given_: Any) -> Options:
    defaults = {"shares": Shares.parse("auto"), "global_batch": None, "loss_count": None}
    return Options(**(defaults | {"memory_limit": 0.9, "granularity": 1} | given_))


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ({"global_batch": 2.5}, "global_batch=2.5 has to be a whole number of samples, or None"),
        ({"global_batch": True}, "global_batch=True has to be a whole number of samples, or None"),
        ({"global_batch": 0}, "global_batch=0 has to be at least 1 sample"),
        ({"global_batch": -8}, "global_batch=-8 has to be at least 1 sample"),
        *(
            (
                {"memory_limit": value},
                f"memory_limit={value!r} has to be a part of the device's memory such as 0.9, or a number of bytes",
            )
            for value in (0, -1.0, float("nan"), float("inf"))
        ),
        *(
            ({"granularity": value}, f"granularity={value!r} has to be a whole number of samples, at least 1")
            for value in (0, -4, 1.5, True)
        ),
    ],
    ids=str,
)
def test_what_can_not_be_used_is_one_sentence(given_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="has to be") as caught:
        options_of(**given_)
    assert str(caught.value) == sentence


@given(
    st.none() | st.integers(1, 10**9) | st.integers(1, 10**6).map(float),
    st.floats(1e-6, 1e15),
    st.integers(1, 10**6),
)
def test_all_else_is_kept_as_it_is(global_batch: float | None, memory_limit: float, granularity: int) -> None:
    options = options_of(global_batch=global_batch, memory_limit=memory_limit, granularity=granularity)
    assert (options.global_batch, options.memory_limit, options.granularity) == (
        global_batch,
        memory_limit,
        granularity,
    )


def test_the_number_of_ranks_is_checked_against_shares_and_the_global_batch() -> None:
    options = options_of(shares=Shares.parse([4, 1]), global_batch=2)
    options.check_world_size(2)
    with pytest.raises(ValueError, match=r"shares=\[4, 1\] has 2 numbers, but there are 3 ranks"):
        options.check_world_size(3)
    with pytest.raises(ValueError, match="global_batch=2 is smaller than the number of ranks, 3"):
        options_of(global_batch=2).check_world_size(3)
    options_of().check_world_size(10**6)


def devices_of(*names: str) -> list[torch.device]:
    return [torch.device(name) for name in names]


@pytest.mark.parametrize(
    ("devices", "named"),
    [(("xla:0", "cpu"), "not on xla"), (("mps", "hpu", "mps"), "not on hpu, mps"), (("meta",), "not on meta")],
)
def test_devices_that_can_not_be_driven_are_named(devices: tuple[str, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"runs on CPUs and CUDA GPUs, {named}: set accelerator='cpu'"):
        check_devices(devices_of(*devices))


@pytest.mark.parametrize(
    ("cores", "devices", "warning"),
    [
        (2, ("cpu", "cpu"), None),
        (2, ("cpu", "cpu", "cuda:0", "cuda:1"), None),
        (1, ("cuda:0", "cuda:1", "cuda:2"), None),
        (1, ("cpu", "cpu"), "2 CPU ranks share 1 core:"),
        (2, ("cpu", "cuda:0", "cpu", "cpu"), "3 CPU ranks share 2 cores:"),
    ],
    ids=str,
)
def test_more_cpu_ranks_than_cores_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, cores: int, devices: tuple[str, ...], warning: str | None
) -> None:
    """Cores that this process may use, where the system says; else those of the machine."""
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(cores)))
    found = check_devices(devices_of(*devices))
    assert found is None if warning is None else found is not None and found.startswith(warning)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    assert check_devices(devices_of(*devices)) == found


def test_a_module_with_nothing_to_train_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="Linear has no trainable parameters"):
        check_trainable(frozen)
    with pytest.raises(ValueError, match="Identity has no trainable parameters"):
        check_trainable(nn.Identity())
    frozen.bias.requires_grad_()
    check_trainable(frozen)
