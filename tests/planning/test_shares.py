"""The option `shares` is parsed once; an invalid one raises an error of one sentence."""

import math
from typing import Any

import numpy as np
import pytest

from lightning_hetero.planning.shares import Shares


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ("fair", "shares='fair' is unknown: use 'auto', 'equal', one number per rank such as [4, 1], or the path"),
        (3, "shares=3 has to be 'auto', 'equal', or one number per rank"),
        (None, "shares=None has to be 'auto', 'equal', or one number per rank"),
        (["a", "b"], "one number per rank such as [4, 1]"),
        ([[1], [2]], "one number per rank such as [4, 1]"),
        (np.array([[1], [2]]), "shares=[[1], [2]] has to be"),
        (np.array(3), "shares=3 has to be"),
        ([1, -2], "shares=[1, -2]: the share of rank 1 is -2; give a number of 0 or more"),
        ([math.nan, 1], "the share of rank 0 is nan"),
        (np.array([1, math.inf]), "the share of rank 1 is inf"),
        ([0, 0], "shares=[0, 0] add up to 0; at least one rank needs a share above 0"),
        ([], "add up to 0"),
    ],
)
def test_what_can_not_be_used_is_said_in_one_sentence(shares: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared below
        Shares.parse(shares)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("shares", "world_size", "sentence"),
    [
        ([1], 2, "shares=[1] has 1 number, but there are 2 ranks: give one per rank"),
        ([1, 2, 3], 2, "shares=[1, 2, 3] has 3 numbers, but there are 2 ranks"),
        (np.array([4, 1, 1]), 2, "shares=[4, 1, 1] has 3 numbers, but there are 2 ranks"),
        ([1, 2], 1, "has 2 numbers, but there is 1 rank:"),
    ],
)
def test_there_has_to_be_one_number_a_rank(shares: Any, world_size: int, sentence: str) -> None:
    parsed = Shares.parse(shares)
    for use in (parsed.check_world_size, parsed.proportions_for):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the sentence is compared below
            use(world_size)
        assert sentence in str(error.value)


@pytest.mark.parametrize("numbers", [[4, 1], (4, 1), np.array([4, 1]), np.array([4.0, 1.0]), np.float32([4, 1])])
def test_numbers_of_any_kind_are_proportions(numbers: Any) -> None:
    """The truth value of a numpy array is ambiguous: comparing one with "auto" raised numpy's own error."""
    assert Shares.parse(numbers) == Shares(adaptive=False, proportions=(4.0, 1.0))
    assert Shares.parse(numbers).proportions_for(2) == (4.0, 1.0)


def test_words_and_profiles_say_what_is_followed() -> None:
    assert Shares.parse("equal") == Shares(adaptive=False)
    assert Shares.parse("auto") == Shares(adaptive=True)
    assert Shares.parse("runs/hetero/profile.json") == Shares(adaptive=True, profile="runs/hetero/profile.json")
    for word in ("equal", "auto"):
        Shares.parse(word).check_world_size(7)
        assert Shares.parse(word).proportions_for(3) == (1.0, 1.0, 1.0)
