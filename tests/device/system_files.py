"""Files like those of /proc and of control groups, in a folder."""

from pathlib import Path

GIB = 2.0**30


def system(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Write files, by their paths in a folder; returns its "proc" and its "cgroup"."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"
