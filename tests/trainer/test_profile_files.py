"""A profile is found by the next run of the same job, and ignored with one warning where it can't be used."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.shares import Shares
from lightning_hetero.trainer.profiles import Profile, ProfileStore

FACTS = {"module": "Net", "layers": (1, 2), "global batch": 64}
AUTO = Shares.parse("auto")
SHAPE = "float32 (3, 8, 8)"


@pytest.fixture
def store() -> ProfileStore:
    return ProfileStore(RankGroup(0, 1, None), torch.device("cpu"))


def path_in(folder: Path) -> Path:
    return folder / "hetero" / "profile.json"


def test_a_run_finds_its_own_profile_and_those_of_earlier_versions(store: ProfileStore, tmp_path: Path) -> None:
    """The newest that fits, without a word of the others: a logger gives every run a folder beside the others."""
    versions = [tmp_path / f"version_{number}" for number in range(4)]
    assert store.load(AUTO, versions[0], FACTS) is None
    store.save(versions[0], FACTS, {"number": 0.1}, SHAPE)
    os.utime(path_in(versions[0]), (1, 1))
    store.save(versions[1], FACTS, {"number": 1}, SHAPE)
    store.save(versions[2], FACTS | {"global batch": 32}, {"number": 2}, SHAPE)
    assert store.load(AUTO, versions[3], FACTS) == Profile({"number": 1}, SHAPE, path_in(versions[1]))
    assert store.load(AUTO, versions[0], FACTS) == Profile({"number": 0.1}, SHAPE, path_in(versions[0]))


def test_shares_that_are_not_adaptive_need_none(store: ProfileStore, tmp_path: Path) -> None:
    store.save(tmp_path, FACTS, {"number": 0}, SHAPE)
    for shares in ("equal", [4, 1]):
        assert store.load(Shares.parse(shares), tmp_path, FACTS) is None


@pytest.mark.parametrize("named", [True, False], ids=["named by the user", "found in the folder"])
@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "1", '"text"', "null", '{"facts": 1, "state": [2], "input_shape": "", "checksum": 0}']
)
def test_what_is_no_profile_is_ignored(store: ProfileStore, tmp_path: Path, content: str, named: bool) -> None:
    path_in(tmp_path).parent.mkdir()
    path_in(tmp_path).write_text(content)
    shares = Shares.parse(str(path_in(tmp_path))) if named else AUTO
    with pytest.warns(UserWarning, match=r"profile\.json is ignored: it can't be read") as caught:
        assert store.load(shares, tmp_path, FACTS) is None
    assert len(caught) == 1


def test_a_profile_that_is_not_there_is_ignored(store: ProfileStore, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="FileNotFoundError") as caught:
        assert store.load(Shares.parse(str(path_in(tmp_path))), tmp_path, FACTS) is None
    assert len(caught) == 1


def test_a_damaged_profile_is_ignored(store: ProfileStore, tmp_path: Path) -> None:
    """So that nobody has to look into the state of a planner for what is wrong with it."""
    store.save(tmp_path, FACTS, {"seconds": [0.25, 0.5]}, SHAPE)
    path_in(tmp_path).write_text(path_in(tmp_path).read_text().replace("0.25", "-7"))
    with pytest.warns(UserWarning, match="it is damaged"):
        assert store.load(AUTO, tmp_path, FACTS) is None


def test_a_profile_of_another_job_says_what_differs(store: ProfileStore, tmp_path: Path) -> None:
    """Once, for the newest, where there are several."""
    for number in range(3):
        store.save(tmp_path / f"version_{number}", FACTS, {}, SHAPE)
    other = FACTS | {"global batch": 32, "more": None}
    with pytest.warns(UserWarning, match="it is of another job, with global batch 64 there, 32 here") as caught:
        assert store.load(AUTO, tmp_path / "version_1", other) is None
    assert len(caught) == 1
    assert "devices" not in str(caught[0].message)


def test_other_devices_are_another_job(store: ProfileStore, tmp_path: Path) -> None:
    store.save(tmp_path, FACTS, {}, SHAPE)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        elsewhere = ProfileStore(RankGroup(0, 1, None), torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    with pytest.warns(UserWarning, match="it is of another job, with devices"):
        assert elsewhere.load(AUTO, tmp_path, FACTS) is None


def test_nothing_is_written_without_a_folder_or_measurements(
    store: ProfileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store.save(None, FACTS, {}, SHAPE)
    store.save(tmp_path, FACTS, None, SHAPE)
    assert list(tmp_path.iterdir()) == []
    assert store.load(AUTO, None, FACTS) is None


def test_a_folder_that_can_not_be_written_to_ends_nothing(store: ProfileStore, tmp_path: Path) -> None:
    (tmp_path / "hetero").write_text("a file stands where the folder should be")
    with pytest.warns(UserWarning, match="the profile of this run could not be written"):
        store.save(tmp_path, FACTS, {}, SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.load(AUTO, tmp_path, FACTS) is None
