"""Numbers as shares, in whatever a user has them."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_hetero import HeteroStrategy
from tests.ranks import run_ranks
from tests.trainer.fits import Recipe, hetero_fit

GIVEN: dict[str, Any] = {
    "list": [4, 1],
    "tuple": (4, 1),
    "integer array": np.array([4, 1]),
    "float array": np.array([0.8, 0.2], dtype=np.float32),
    "tensor": torch.tensor([4.0, 1.0]),
}


def plans() -> dict[str, Any]:
    recipe = Recipe(batch_size=5, max_epochs=1, limit_train_batches=2)
    return {name: hetero_fit(recipe, {"shares": shares})["plan"] for name, shares in GIVEN.items()}


def test_one_number_a_rank_is_a_proportion_whatever_holds_it() -> None:
    assert run_ranks(2, plans) == [dict.fromkeys(GIVEN, (8, 2))] * 2


@pytest.mark.parametrize(
    "shares",
    [np.array([[4, 1]]), np.array(4), np.array(["a", "b"]), torch.tensor([[4.0, 1.0]]), torch.tensor(4.0), {}, None],
    ids=str,
)
def test_what_is_no_number_a_rank_is_one_sentence(shares: Any) -> None:
    with pytest.raises(ValueError, match=r"^shares="):
        HeteroStrategy(shares=shares)
