"""What a run has learnt is found by the next run of the same job, and by no other."""

import json
import os
from pathlib import Path

import pytest

from lightning_hetero.planning.balancer import Balancer
from lightning_hetero.planning.planner import Planner
from lightning_hetero.trainer import profiles

FACTS = {"module": "Net", "devices": [("host", "cpu", 1), ("host", "cpu", 1)], "global batch": 64}


def learnt() -> dict:
    balancer = Balancer(2, 64)
    for step in range(6):
        balancer.observe(step, (32, 32), [0.1 + 0.01 * 32, 0.1 + 0.04 * 32])
    for step in range(6, 9):
        balancer.observe(step, (50, 14), [0.1 + 0.01 * 50, 0.1 + 0.04 * 14])
    return balancer.state_dict()


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


def test_a_planner_begins_where_the_earlier_run_ended() -> None:
    """Through JSON. The balanced split is there from step 0; a device that is slower now is noticed all the same."""
    planner = Planner("auto", 2, 64, known=json.loads(json.dumps(learnt())))
    first = planner.schedule.newest
    assert (first.first_step, first.reason) == (0, "profile")
    assert first.local_batches == (50, 14), "52/12 would be faster, but nothing is known of rank 0's memory there"
    assert first.predicted_seconds == pytest.approx((0.6, 0.66))
    for step in range(12):
        split = planner.schedule.at(step).local_batches
        planner.observe([step, step], [0.1 + 0.01 * split[0], 3 * (0.1 + 0.04 * split[1])], step)
    assert planner.schedule.newest.local_batches[0] >= 57


def test_a_planner_refuses_what_was_learnt_of_another_job() -> None:
    with pytest.raises(ValueError, match="global_batch 64 into one of 32"):
        Planner("auto", 2, 32, known=learnt())
    with pytest.raises(ValueError, match="nothing to start from"):
        Planner("auto", 2, 64, known=Balancer(2, 64).state_dict())
    with pytest.raises(ValueError, match="damaged"):
        Planner("auto", 2, 64, known=learnt() | {"measured": [1, 2]})
