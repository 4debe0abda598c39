"""What a run has learnt of its devices, kept in its folder for the next run of the same job.

A profile is the balancer's state beside the facts that it holds for, as plain JSON.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_VERSION = 1
_FILE = Path("hetero") / "profile.json"


def write(folder: str | Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Keep what was learnt; the file is either the old or the new one, never a part.

    Args:
        folder: of the run.
        facts: what the job is, as JSON has it: the state holds for an equal one only.
        state: `Balancer.state_dict()`.
    """
    path = Path(folder) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps({"version": _VERSION, "facts": dict(facts), "state": dict(state)}), encoding="utf-8")
    part.replace(path)
    return path


def read(path: str | Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a profile of an equal job.

    Raises:
        ValueError: it is none, or of another job; the sentence says what differs.
    """
    try:
        profile = json.loads(Path(path).read_text(encoding="utf-8"))
        version, known, state = profile["version"], dict(profile["facts"]), dict(profile["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no profile of a run: {type(error).__name__}: {error}") from None
    if version != _VERSION:
        raise ValueError(f"the profile {path} is of version {version}, this library reads version {_VERSION}")
    own = json.loads(json.dumps(dict(facts)))  # lists for tuples
    names = [name for name in {**own, **known} if known.get(name) != own.get(name)]
    if differences := [f"{name} {known.get(name)!r} there, {own.get(name)!r} here" for name in names]:
        raise ValueError(f"the profile {path} is of another job: {'; '.join(differences)}")
    result: dict[str, Any] = state
    return result


def find(folder: str | Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the newest profile of an equal job, in a run's folder or in those of the runs beside it."""
    own = Path(folder)
    beside = sorted(own.parent.glob(f"version_*/{_FILE}"), key=_age)
    for path in (own / _FILE, *beside):
        try:
            return read(path, facts)
        except ValueError:
            continue  # it is not for this job
    return None


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0
