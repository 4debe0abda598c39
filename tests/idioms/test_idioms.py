"""Each idiom has under `hetero` the values of one process, or ends with its sentence on every rank."""

import pytest

from tests.idioms.gallery import SHARES
from tests.idioms.running import gallery, judgements


@pytest.mark.parametrize("mode", SHARES)
@pytest.mark.parametrize(("topic", "name"), [pytest.param(topic, i.name, id=i.name) for topic, i in gallery()])
def test_idiom(topic: str, name: str, mode: str) -> None:
    wrong = judgements(topic, *SHARES)[mode, name]
    assert wrong is None, wrong
