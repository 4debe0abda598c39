"""Profiles: measurements of a run's devices, saved in its folder (if any) for the next run of the same job.

A profile is only a cache: one that can't be used is ignored.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_hetero.device.name import device_identity
from lightning_hetero.exchange.groups import RankGroup
from lightning_hetero.planning.shares import Shares

_FILE = Path("hetero") / "profile.json"


def run_folder(trainer: "pl.Trainer") -> Path | None:
    """The folder of the Trainer's first logger, or else the ``default_root_dir`` that it was given.

    All ranks have to call this together: ``Trainer.log_dir`` is broadcast.

    Returns:
        None where neither is a local folder, or is one only because the user named none: for ``default_root_dir``
        Lightning then takes the working directory, and so do loggers such as ``WandbLogger``.
    """
    logged = trainer.log_dir if trainer.loggers else None
    if logged and "://" not in logged and Path(logged).resolve() != Path.cwd():
        return Path(logged)
    root = trainer.default_root_dir
    # A user who gives "." has chosen it: Lightning's own default is the whole path.
    return Path(root) if "://" not in root and root != os.getcwd() else None  # noqa: PTH109 - as Lightning does


@dataclass(frozen=True)
class Profile:
    """What an earlier run of the same job has measured."""

    state: Mapping[str, Any]  # of the planner, see `SplitPlanner.state_dict`
    input_shape: str  # of the first batch; belongs to the job, and is compared once this run has a batch
    path: Path


class ProfileStore:
    """Loads and saves profiles, which are valid for the same devices only; all ranks have to construct it together."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        self._group = group
        self._devices = group.gather(device_identity(device))

    def load(self, shares: Shares, folder: Path | None, facts: Mapping[str, Any]) -> Profile | None:
        """The profile that the user names, or else the newest of the same job in the run's folder or a sibling folder.

        All ranks have to call this together, and get what rank 0 finds. If none can be used, one warning says why.

        Args:
            shares: only adaptive ones need a profile, and may name one.
            folder: of the run; None if it has none.
            facts: what else identifies the job, as JSON values; a profile is used only if they are equal.
        """
        if not shares.adaptive:
            return None
        return self._group.from_rank_zero(lambda: self._find(_candidates(shares, folder), facts))

    def save(
        self, folder: Path | None, facts: Mapping[str, Any], state: Mapping[str, Any] | None, input_shape: str
    ) -> None:
        """Write a profile on the first rank, unless there is no folder or no state; see `load` and `Profile`."""
        if self._group.rank != 0 or folder is None or state is None:
            return
        path, all_facts = folder / _FILE, {**facts, "devices": self._devices}
        content = {"facts": all_facts, "input_shape": input_shape, "state": state, "checksum": _checksum(state)}
        part = path.with_name(f"{path.name}.{os.getpid()}")  # the file is either the old or the new one
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(content), encoding="utf-8")
            part.replace(path)
        except OSError as error:  # no reason to lose the training
            rank_zero_warn(f"the profile of this run could not be written: {error}")

    def _find(self, paths: list[Path], facts: Mapping[str, Any]) -> Profile | None:
        problems = []
        for path in paths:
            try:
                return _read(path, {**facts, "devices": self._devices})
            except ValueError as error:
                problems.append(f"the profile {path} is ignored: {error}")
        if problems:
            rank_zero_warn(problems[0])
        return None


def _candidates(shares: Shares, folder: Path | None) -> list[Path]:
    if shares.profile is not None:
        return [Path(shares.profile)]
    if folder is None:
        return []
    beside = sorted(folder.parent.glob(f"version_*/{_FILE}"), key=_age)
    return list(dict.fromkeys([*folder.glob(str(_FILE)), *beside]))


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0


def _read(path: Path, facts: Mapping[str, Any]) -> Profile:
    """The profile in a file; a ValueError says why it can't be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, state, input_shape = dict(content["facts"]), dict(content["state"]), str(content["input_shape"])
        damaged = content["checksum"] != _checksum(state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"it can't be read ({type(error).__name__}: {error})") from None
    if damaged:
        raise ValueError("it is damaged")
    here = json.loads(json.dumps(facts))  # lists for tuples
    names = [name for name in {**here, **known} if known.get(name) != here.get(name)]
    if differences := [f"{name} {known.get(name)!r} there, {here.get(name)!r} here" for name in names]:
        raise ValueError(f"it is of another job, with {'; '.join(differences)}")
    return Profile(state, input_shape, path)


def _checksum(state: Mapping[str, Any]) -> int:
    """The same before and after a round trip through JSON."""
    return crc32(json.dumps(state).encode())
