"""Reports: what all of them say, and how they are written."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine

_WIDTH = 110


def head(question: str, options: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """What a report says before anything is measured.

    Args:
        question: that it answers.
        options: of the command line.
        keys: those that make up the configuration.
    """
    return {
        "question": question,
        "command": machine.command(),
        "date": time.strftime("%Y-%m-%d"),
        "configuration": {key: getattr(options, key) for key in keys},
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "threads_per_rank": 1,
        "load_before": machine.load(),
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report so that a change of it can be read: what is short is one line, an entry of a list always is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(_rounded(report), "") + "\n")


def _text(value: Any, indent: str) -> str:
    line = json.dumps(value)
    if not isinstance(value, dict | list) or not value:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        if len(indent) + len(line) <= _WIDTH and indent:
            return line
        entries = [f"{json.dumps(str(key))}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + entry for entry in entries) + f"\n{indent}}}"
    if not any(isinstance(item, dict | list) for item in value) or len(indent) + len(line) <= _WIDTH:
        return line
    whole = [_text(item, inner) if _holds_tables(item) else json.dumps(item) for item in value]
    return "[\n" + ",\n".join(inner + entry for entry in whole) + f"\n{indent}]"


def _holds_tables(value: Any) -> bool:
    """Whether an entry of a list is a report by itself, with lists of entries in it."""
    return isinstance(value, dict) and any(
        isinstance(item, list) and any(isinstance(entry, dict) for entry in item) for item in value.values()
    )


def _rounded(value: Any) -> Any:
    """Microseconds are enough."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def say(text: str) -> None:
    """Progress, beside the report."""
    print(text, file=sys.stderr, flush=True)
