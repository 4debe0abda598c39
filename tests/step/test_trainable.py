"""Which parameters train: a change is noticed, and a difference between ranks is described."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_hetero.step.trainable import TrainableParameters, TrainableSet, describe_difference, trainable_ids


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_a_change_is_noticed_once() -> None:
    """Also of a layer that has the names and shapes of the one before; fails if only flags are compared."""
    module = net()
    trainable = TrainableParameters(module, 0, None)
    first = trainable.current
    trainable.look()
    assert trainable.current is first
    assert trainable.is_wrapped

    module[0].requires_grad_(requires_grad=False)
    trainable.look()
    assert not trainable.is_wrapped
    assert list(trainable.current.named) == ["2.weight", "2.bias"]
    assert trainable.take_new() == []
    trainable.set_wrapped()
    second = trainable.current.checksum

    module[2] = nn.Linear(4, 1)
    trainable.look()
    assert not trainable.is_wrapped
    assert trainable.current.shapes == trainable.wrapped.shapes
    assert trainable.current.checksum != second
    assert [id(one) for one in trainable.take_new()] == [id(one) for one in module[2].parameters()]
    trainable.set_wrapped()
    assert trainable.take_new() == []


def test_a_change_that_is_taken_back_is_none() -> None:
    module = net()
    trainable = TrainableParameters(module, 0, None)
    module[0].requires_grad_(requires_grad=False)
    trainable.look()
    module[0].requires_grad_()
    trainable.look()
    assert trainable.is_wrapped


def test_parameters_that_ddp_ignores_are_left_out() -> None:
    """They may differ between ranks: no rank may wait for another because of them."""
    module = net()
    module._ddp_params_and_buffers_to_ignore = ["0.weight"]
    trainable = TrainableParameters(module, 0, None)
    module[0].weight.requires_grad_(requires_grad=False)
    trainable.look()
    assert trainable.is_wrapped
    assert list(TrainableSet.of(module).named) == ["0.bias", "2.weight", "2.bias"]


def test_a_pause_within_a_step() -> None:
    module = net()
    trainable = TrainableParameters(module, 0, None)
    module[0].requires_grad_(requires_grad=False)
    assert trainable.has_changed(may_pause=False)
    assert not trainable.has_changed(may_pause=True)
    module[2] = nn.Linear(4, 1)
    assert trainable.has_changed(may_pause=True)


def test_a_wrapper_that_was_bypassed_is_never_used_again() -> None:
    """Even where the parameters are again those that it knows: its hooks are gone."""
    module = net()
    trainable = TrainableParameters(module, 0, None)
    module[0].requires_grad_(requires_grad=False)
    assert len(trainable.bypass()) == 4
    module[0].requires_grad_()
    trainable.look()
    assert not trainable.is_wrapped


def test_shared_and_missing_layers() -> None:
    """The quick walk finds what `Module.parameters` finds."""
    module = net()
    module.append(module[0])
    module[1].register_module("nothing", None)
    module[1].register_parameter("none", None)
    assert set(trainable_ids(module)) == {id(one) for one in module.parameters()}


def test_each_rank_says_the_same() -> None:
    """Without waiting for each other: each has published its parameters before."""
    store = dist.HashStore()
    modules = [net(), net()]
    ranks = [TrainableParameters(module, rank, store) for rank, module in enumerate(modules)]
    modules[1][0].requires_grad_(requires_grad=False)
    for rank in ranks:
        rank.look()
    checksums = [float(rank.current.checksum) for rank in ranks]
    for rank in ranks:
        with pytest.raises(RuntimeError, match=r"global batch 7: 0.weight, 0.bias train on rank 0, but not on rank 1"):
            rank.check(checksums, 7)
    modules[0][0].requires_grad_(requires_grad=False)
    ranks[0].look()
    ranks[0].check([float(rank.current.checksum) for rank in ranks], 7)


def test_dtypes_and_shapes_count() -> None:
    base = TrainableSet.of(net()).checksum
    assert TrainableSet.of(net()).checksum == base
    assert TrainableSet.of(net().to(torch.float64)).checksum != base


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([{"a": [1]}, {}], "a trains on rank 0, but not on rank 1"),
        ([{}, {"a": [1], "b": [1]}, {"a": [1], "b": [1]}], "a, b train on ranks 1, 2, but not on rank 0"),
        ([{"a": [1]}, {"b": [1]}], "a trains on rank 0, but not on rank 1; b trains on rank 1, but not on rank 0"),
        ([{"a": [2, 3]}, {"a": [4, 3]}], "a has the shape (2, 3) on rank 0, (4, 3) on rank 1"),
        ([{name: [1] for name in "abcdef"}, {}], "a, b, c and 3 more train on rank 0, but not on rank 1"),
        ([{"a": [1]}, {"a": [1]}], "those of rank 1 have been replaced, reordered or converted"),
    ],
)
def test_a_difference_in_words(shapes: list[dict[str, list[int]]], said: str) -> None:
    assert describe_difference(shapes, anew=[1]) == said
