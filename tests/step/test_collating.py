"""How many samples a batch holds, whatever the collate function makes of them, and what stands in for an empty one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from lightning_hetero.step.collating import NO_SAMPLES, Collated, CountingCollate, KeptBatches


def pairs(size: int, *shape: int) -> list[Any]:
    """Samples of a tensor and a class."""
    return [(torch.zeros(shape), index) for index in range(size)]


def time_first(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples], 1)


def first(count: int) -> Callable[[list[Any]], Any]:
    """Leaves all but the first samples out, without a sign of that in them."""
    return lambda samples: default_collate(samples[:count])


def readable(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample is not None])


KEPT: dict[str, tuple[Any, list[Any], int]] = {
    "all": (first(4), pairs(4, 5), 4),
    "series with time first": (time_first, pairs(6, 3, 5), 6),
    "as long as wide": (time_first, pairs(3, 3, 3), 3),
    "padded series of tokens with time first": (
        torch.nn.utils.rnn.pad_sequence,
        [torch.zeros(length) for length in (2, 4, 1, 3, 2)],
        5,
    ),
    "a list of images": (lambda samples: [x for x, _ in samples], pairs(5, 3, 8, 8), 5),
    "lists of images and boxes": (
        lambda samples: tuple(zip(*samples, strict=True)),
        [(torch.zeros(3, 8, 8), {"boxes": torch.zeros(k, 4), "image_id": k}) for k in range(4)],
        4,
    ),
    "lists of features": (lambda samples: tuple(zip(*samples, strict=True)), pairs(7, 5), 7),
    "nodes of graphs": (
        lambda samples: {"nodes": torch.cat([x for x, _ in samples]), "edges": torch.zeros(2, 9)},
        pairs(6, 4, 3),
        6,
    ),
    "two views of each": (lambda samples: default_collate(samples * 2), pairs(4, 5), 4),
    "images, of which some are left out": (first(2), pairs(3, 3, 8, 8), 2),
    "only images, as many as channels": (
        lambda samples: torch.stack([x for x, _ in samples[:2]]),
        pairs(3, 3, 8, 8),
        2,
    ),
    "a tensor for each image's label": (
        lambda samples: ([x for x, _ in samples], [{"labels": torch.tensor([y])} for _, y in samples]),
        [(torch.zeros(3, 4 + k, 5), k) for k in range(4)],
        4,
    ),
    "the same, of which one is left out": (
        lambda samples: ([x for x, _ in samples[1:]], [{"labels": torch.tensor([y])} for _, y in samples[1:]]),
        [(torch.zeros(3, 4 + k, 5), k) for k in range(4)],
        3,
    ),
    "a list of resized images": (
        lambda samples: [x[:, :2, :2] for x, _ in samples],
        pairs(5, 3, 8, 8),
        5,
    ),
    "pairs, of which some are left out": (lambda samples: list(samples[:3]), pairs(5, 3, 8, 8), 3),
    "as torchvision's detectors take them, some left out": (
        lambda samples: tuple(zip(*samples[:3], strict=True)),
        [(torch.zeros(3, 8 + k, 8), {"boxes": torch.zeros(k, 4)}) for k in range(5)],
        3,
    ),
    "two samples, one left out": (first(1), pairs(2, 3, 8, 8), 1),
    "transformed and stacked, some left out": (
        lambda samples: {
            "x": torch.stack([x[:, :2, :2] for x, _ in samples[:2]]),
            "y": torch.nn.functional.one_hot(torch.tensor([y for _, y in samples[:2]]), 7),
        },
        pairs(5, 3, 8, 8),
        2,
    ),
    "None": (readable, [*pairs(3, 5), None, None], 3),
    "None in a list": (lambda samples: [s for s in samples if s is not None], [*pairs(3, 3, 8, 8), None], 3),
    "no batch": (lambda _: None, pairs(3, 5), 0),
    "an empty list": (lambda _: [], pairs(3, 5), 0),
    "empty tensors": (lambda _: {"x": torch.zeros(0, 5), "y": [torch.zeros(0)]}, pairs(3, 5), 0),
    "nothing to collate": (readable, [None, None], 0),
    "nothing to stack": (lambda samples: torch.stack([x for x, ok in samples if ok < 0]), pairs(3, 5), 0),
}


@pytest.mark.parametrize(("collate", "samples", "kept"), KEPT.values(), ids=KEPT)
def test_samples_are_those_that_went_in_less_what_was_left_out(collate: Any, samples: list[Any], kept: int) -> None:
    assert CountingCollate(collate)(samples).samples == kept


def test_an_error_that_no_samples_would_not_raise_is_the_users() -> None:
    """An unreadable sample that the collate function does not leave out ends the run, as in one process."""

    def unprepared(samples: list[Any]) -> Any:
        return default_collate([sample["x"] for sample in samples])

    with pytest.raises(TypeError, match="not subscriptable"):
        CountingCollate(unprepared)([None, None])


def test_torchs_own_function_leaves_nothing_out() -> None:
    collate = CountingCollate(default_collate)
    assert not collate.may_drop
    batch, samples = collate(pairs(4, 5))
    assert (samples, batch[0].shape) == (4, (4, 5))


@pytest.mark.parametrize(
    ("held", "trained"),
    [
        ([2, 3], "ab"),
        ([2, 0, 0, 3], "aaad"),  # the one before
        ([0, 0, 1, 0], "cccc"),  # the next one, which then has its own turn
        ([0, 0], [NO_SAMPLES, NO_SAMPLES]),
        ([0, 1, 0], "bbb"),
    ],
)
def test_another_batch_stands_in_for_one_without_samples(held: list[int], trained: Any) -> None:
    loaded = [Collated(letter if samples else None, samples) for letter, samples in zip("abcd", held, strict=False)]
    recorded: list[int] = []
    assert list(KeptBatches(iter(loaded), recorded.append, may_drop=True)) == list(trained)
    assert recorded == held
