"""Each idiom has under `hetero` the values of one process, or ends with its sentence on every rank."""

import pytest

from tests.idioms import table
from tests.idioms.gallery import SHARES
from tests.idioms.running import gallery, judgements


@pytest.mark.parametrize("mode", SHARES)
@pytest.mark.parametrize(("topic", "name"), [pytest.param(topic, i.name, id=i.name) for topic, i in gallery()])
def test_idiom(topic: str, name: str, mode: str) -> None:
    judgement = judgements(topic, *SHARES)[mode, name]
    assert judgement.verdict in {"equal", "sentence"}, f"{judgement.verdict}\n{judgement.details}"


def test_the_table_of_the_documentation_is_that_of_the_gallery() -> None:
    """The command that makes it has to be run again where idioms were added or renamed."""
    assert [(name, *hetero) for name, _, *hetero in table.read()] == [
        (idiom.name, *[idiom.reason or "equal"] * len(SHARES)) for _, idiom in gallery()
    ]
