"""Calls that ranks make together: their names in numbers, and the sentence where they differ."""

import pytest

from lightning_hetero.exchange.calls import OF_USER, Call, Place, listed, pack, unmatched, unpack


@pytest.mark.parametrize("text", ["", "reduce in on_train_batch_end", "Größe ≥ 3 µm"])
def test_a_text_comes_back_from_numbers(text: str) -> None:
    assert unpack(pack(text)) == text


def test_a_long_text_is_cut() -> None:
    assert unpack(pack("é" * 99)) == "é" * 36


def test_names_differ_as_numbers_do() -> None:
    assert Call("reduce", "here").checksum == Call("reduce", "there").checksum
    assert Call("reduce", "here").checksum != Call("barrier", "here").checksum


def test_the_call_of_the_user_is_the_one_that_is_made_alone() -> None:
    steps = [Place(f"rank {rank} (cpu)", "the training step of global batch 8") for rank in (0, 2)]
    users = Place("rank 1 (cuda:1)", "reduce in on_train_batch_end", OF_USER)
    said = (
        "the ranks went different ways: rank 1 (cuda:1) is alone in reduce in on_train_batch_end, while rank 0 (cpu) "
        "and rank 2 (cpu) are in the training step of global batch 8: no rank can go on. All ranks have to make this "
        "call, in the same order: don't make it under a condition that differs between them, such as "
        "`if trainer.is_global_zero`."
    )
    assert str(unmatched([steps[0], users, steps[1]])) == said


def test_many_names_are_cut() -> None:
    assert listed(["a"]) == "a"
    assert listed(list("abcdefg")) == "a, b, c, d and 3 more"
