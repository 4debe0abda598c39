"""Batches are cut between samples, whatever they are made of, or not at all."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.step.out_of_memory.batch_slicing import CannotSliceError, halves, join_outputs, slice_batch


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Patch:
    image: torch.Tensor
    names: list[str]


class Opaque:
    pass


def rows(size: int) -> torch.Tensor:
    return torch.arange(size * 3).reshape(size, 3)


def test_everything_that_has_one_entry_per_sample_is_sliced() -> None:
    batch = {
        "image": rows(5),
        "array": np.arange(5),
        "names": list("abcde"),
        "bounds": [Opaque() for _ in range(5)],
        "boxes": [torch.zeros(k, 4) for k in (0, 2, 1, 9, 1)],
        "scale": 3,
        "crs": "EPSG:4326",
        "temperature": torch.tensor(2.0),
        "inside": {"mask": rows(5), "nothing": None},
        "views": [rows(5), rows(5)],
    }
    cut = slice_batch(batch, 5, 1, 3)
    assert torch.equal(cut["image"], batch["image"][1:3])
    assert cut["image"].data_ptr() == batch["image"][1].data_ptr(), "a view"
    assert cut["array"].tolist() == [1, 2]
    assert cut["names"] == ["b", "c"]
    assert cut["bounds"] == batch["bounds"][1:3]
    assert [len(boxes) for boxes in cut["boxes"]] == [2, 1]
    assert (cut["scale"], cut["crs"], cut["inside"]["nothing"]) == (3, "EPSG:4326", None)
    assert cut["temperature"] is batch["temperature"]
    assert torch.equal(cut["inside"]["mask"], rows(5)[1:3])
    assert [view.tolist() for view in cut["views"]] == [rows(5)[1:3].tolist()] * 2


@pytest.mark.parametrize(
    "batch", [[rows(2), torch.arange(2)], (rows(2), torch.arange(2)), Pair(rows(2), torch.arange(2))]
)
def test_a_batch_of_two_samples_in_two_fields_is_cut_in_its_fields(batch: Any) -> None:
    cut = slice_batch(batch, 2, 1, 2)
    assert type(cut) is type(batch)
    assert len(cut) == 2
    assert cut[0].tolist() == [[3, 4, 5]]
    assert cut[1].tolist() == [1]


def test_types_are_kept() -> None:
    cut = slice_batch(Patch(rows(4), list("abcd")), 4, 0, 2)
    assert isinstance(cut, Patch)
    assert (len(cut.image), cut.names) == (2, ["a", "b"])
    assert slice_batch([[torch.zeros(3, 8, 8)] * 4, [{"boxes": torch.zeros(2, 4)}] * 4], 4, 0, 1)[1][0][
        "boxes"
    ].shape == (
        2,
        4,
    )
    assert slice_batch(rows(4), 4, 2, 4).tolist() == rows(4)[2:].tolist()


@pytest.mark.parametrize(
    "batch",
    [
        {"a": rows(4), "b": rows(3)},
        {"a": rows(4), "b": Opaque()},
        {"a": rows(4), "b": ["x", "y", Opaque()]},
        {"a": rows(2), "b": [rows(2), rows(2)]},
        Opaque(),
    ],
)
def test_what_can_not_be_cut_for_sure_is_not_cut(batch: Any) -> None:
    with pytest.raises(CannotSliceError):
        slice_batch(batch, 2 if isinstance(batch, dict) and len(batch["a"]) == 2 else 4, 0, 1)


@given(st.integers(1, 40), st.integers(1, 2), st.integers(1, 40))
def test_halves_of_halves_have_every_sample_once(size: int, smallest: int, fits: int) -> None:
    waiting, seen = [(0, size)], []
    while waiting:
        start, stop = waiting.pop()
        two = halves(stop - start, smallest)
        if stop - start > fits and two is not None:
            assert min(two) >= smallest
            waiting += [(start + two[0], stop), (start, start + two[0])]
        else:
            seen += slice_batch(list(range(size)), size, start, stop)
    assert seen == list(range(size))


def test_outputs_of_parts_are_joined() -> None:
    loss = torch.tensor(7.0)
    assert join_outputs([torch.tensor(1.0), torch.tensor(2.0)], [2, 1], loss) is loss
    outputs = [
        {"loss": torch.tensor(1.0), "out": rows(2), "mean": torch.tensor(3.0), "extra": "a"},
        {"loss": torch.tensor(2.0), "out": rows(1), "mean": torch.tensor(6.0), "extra": "b"},
    ]
    made = join_outputs(outputs, [2, 1], loss)
    assert made["loss"] is loss
    assert made["out"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert float(made["mean"]) == 4.0
    assert made["extra"] == "b"
