"""What ranks must agree on, and the error if they don't."""

from importlib.metadata import PackageNotFoundError

import pytest
from torch import nn

from lightning_hetero.exchange import consistency


def test_a_source_tree_that_is_not_installed_is_no_reason_to_stop(monkeypatch):
    """As with PYTHONPATH; ranks with an installed package differ from it."""
    installed = consistency.facts(nn.Linear(2, 1), "32-true")
    version = consistency.version

    def not_installed(name: str) -> str:
        if name == "lightning-hetero":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(consistency, "version", not_installed)
    without = consistency.facts(nn.Linear(2, 1), "32-true")
    assert consistency.differences([without, without]) == []
    (line,) = consistency.differences([installed, without, without])
    assert line.endswith("on rank 0, '(not installed)' on ranks 1, 2")


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ((3, 3), "shape of weight: (1, 2) on rank 0, (1, 3) on ranks 1, 2"),
        ((2, 3), "shape of weight: (1, 2) on ranks 0, 1, (1, 3) on rank 2"),
    ],
)
def test_what_differs_is_named_with_its_ranks(others, line):
    facts = [consistency.facts(nn.Linear(width, 1), "32-true") for width in (2, *others)]
    assert consistency.differences(facts) == [line]
