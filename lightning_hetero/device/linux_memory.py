"""What Linux reports about memory, in `/proc` and in control groups."""

from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def machine_id(proc: Path = PROC) -> str:
    """An identifier that differs between machines and between boots; empty if not known."""
    return _read(proc / "sys/kernel/random/boot_id") or ""


def total_bytes(proc: Path = PROC) -> float:
    """The machine's main memory; infinity if not known."""
    return _entry(_read(proc / "meminfo") or "", "MemTotal") or float("inf")


def resident_bytes(proc: Path = PROC, *, peak: bool = False) -> float:
    """Resident bytes of this process, without pages of files, which the kernel can reclaim.

    The peak is since `forget_peak`, or since the process started.
    """
    text = _read(proc / "self/status") or ""
    return max(0.0, _entry(text, "VmHWM" if peak else "VmRSS") - _entry(text, "RssFile"))


def forget_peak(proc: Path = PROC) -> None:
    """Reset the peak of resident memory; raises an OSError if this process lacks the permission."""
    (proc / "self/clear_refs").write_text("5")


def control_group_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> dict[str, float]:
    """The bytes that this process's control groups (version 1 or 2) and their parents allow, without unlimited ones.

    In a container, the path of a group may be the one on the host; then the container's own root group is used.
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
                # For no limit, version 1 has a number near 2**63, and version 2 "max".
                if text is not None and text.isdigit() and int(text) < 2**60:
                    found[str(folder)] = float(text)
    return found


def _entry(text: str, name: str) -> float:
    """The bytes of a named entry, given in KiB by the kernel; 0 if there is none."""
    start = text.find(f"{name}:")
    return float(text[start + len(name) + 1 :].split(maxsplit=1)[0]) * 1024 if start >= 0 else 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
