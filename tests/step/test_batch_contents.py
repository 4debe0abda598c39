"""The input shape of a batch, independent of the number of samples, and that number."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from lightning_hetero.step.batch_contents import input_shape, sample_count


@pytest.mark.parametrize("local_batch", [1, 5])
def test_types_and_shapes_but_for_the_batch_dimension(local_batch):
    batch = {
        "image": torch.zeros(local_batch, 13, 64, 32),
        "mask": torch.zeros(local_batch, 64, 32, dtype=torch.int64),
        "label": torch.zeros(local_batch, dtype=torch.int64),
        "path": ["a"] * local_batch,
        "bounds": None,
    }
    assert input_shape(batch) == "float32 (13, 64, 32), int64 (64, 32), int64 ()"


def test_nested_batches():
    pair = namedtuple("pair", "x y")  # noqa: PYI024 - a batch may be one
    batch = [pair(torch.zeros(2, 3), (torch.zeros(2, 4, dtype=torch.float64),)), {"more": [torch.zeros(2, 5)]}]
    assert input_shape(batch) == "float32 (3,), float64 (4,), float32 (5,)"


def test_lists_of_samples_have_each_shape_once():
    """Detection has a list of images, one a sample: their number is the local batch."""
    for local_batch in (1, 3):
        assert input_shape({"image": [torch.zeros(3, 8, 8)] * local_batch}) == "float32 (8, 8)"


@pytest.mark.parametrize("batch", [None, 3, "text", {}, [], torch.tensor(1.0), {"index": torch.tensor(4), "size": 2}])
def test_what_has_no_batch_dimension_does_not_count(batch):
    assert input_shape(batch) == ""


def test_arrays_are_not_walked_through_and_iterators_not_used_up():
    batch = {"image": torch.zeros(3, 2), "scale": np.zeros(()), "later": iter([torch.zeros(4, 5)])}
    assert sample_count(batch) == 3
    assert input_shape(batch) == "float32 (2,)"
    assert len(next(batch["later"])) == 4
