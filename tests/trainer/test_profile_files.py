"""What a run has learnt is found by the next run of the same job, and by no other."""

import os
from pathlib import Path

import pytest

from lightning_hetero.trainer import profiles

FACTS = {"module": "Net", "devices": [("host", "cpu", 1), ("host", "cpu", 1)], "global batch": 64}


def test_a_run_finds_its_own_profile_and_those_of_earlier_versions(tmp_path: Path) -> None:
    """The newest that fits: Lightning's loggers give every run a folder of its own beside the others."""
    assert profiles.find(tmp_path / "version_0", FACTS) is None
    first = profiles.write(tmp_path / "version_0", FACTS, {"number": 0})
    os.utime(first, (1, 1))
    profiles.write(tmp_path / "version_1", FACTS, {"number": 1})
    profiles.write(tmp_path / "version_2", FACTS | {"global batch": 32}, {"number": 2})
    assert profiles.find(tmp_path / "version_3", FACTS) == {"number": 1}
    assert profiles.find(tmp_path / "version_0", FACTS) == {"number": 0}


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"version": 1}', '{"version": 7, "facts": {}, "state": {}}'])
def test_what_is_no_profile_is_passed_over_and_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "hetero" / "profile.json"
    path.parent.mkdir()
    path.write_text(content)
    assert profiles.find(tmp_path, FACTS) is None
    with pytest.raises(ValueError, match=r"profile\.json"):
        profiles.read(path, FACTS)


def test_a_profile_of_another_job_says_what_differs(tmp_path: Path) -> None:
    path = profiles.write(tmp_path, FACTS, {})
    with pytest.raises(ValueError, match="global batch 64 there, 32 here") as caught:
        profiles.read(path, FACTS | {"global batch": 32})
    assert "devices" not in str(caught.value)
