"""What Linux says of memory, in `/proc` and in the control groups."""

from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def machine_id(proc: Path = PROC) -> str:
    """Differs between machines, and between starts of one; empty if not known."""
    return _read(proc / "sys/kernel/random/boot_id") or ""


def total_bytes(proc: Path = PROC) -> float:
    """The machine's main memory; infinity if not known."""
    return _entry(_read(proc / "meminfo") or "", "MemTotal") or float("inf")


def resident_bytes(proc: Path = PROC, *, peak: bool = False) -> float:
    """What this process has in main memory, without the pages of files, which the system can take back.

    The peak is the most that it had since `forget_peak`, or since it started.
    """
    text = _read(proc / "self/status") or ""
    return max(0.0, _entry(text, "VmHWM" if peak else "VmRSS") - _entry(text, "RssFile"))


def forget_peak(proc: Path = PROC) -> None:
    """Begin with a new peak of resident memory; an OSError if this process may not do so."""
    (proc / "self/clear_refs").write_text("5")


def control_group_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> dict[str, float]:
    """The bytes that this process's control groups and their parents allow, version 1 and 2; unlimited ones left out.

    In a container, the path of a group may be that of the machine outside; then the container's own root counts.
    """
    found: dict[str, float] = {}
    for line in (_read(proc / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots, name = (cgroups, cgroups / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = (cgroups / "memory", cgroups / controllers), "memory.limit_in_bytes"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for root in roots:
            for folder in [root / inside, *(root / parent for parent in inside.parents)]:
                text = _read(folder / name)
                # Version 1 writes the largest number of pages there is for no limit, version 2 "max".
                if text is not None and text.isdigit() and int(text) < 2**60:
                    found[str(folder)] = float(text)
    return found


def _entry(text: str, name: str) -> float:
    """Bytes behind a name in the system's tables, which give KiB; 0 if it is not there."""
    start = text.find(f"{name}:")
    return float(text[start + len(name) + 1 :].split(maxsplit=1)[0]) * 1024 if start >= 0 else 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
