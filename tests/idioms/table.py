"""Makes the table of `docs/idioms.md`: `python -m tests.idioms.table`. Takes minutes: what hangs is waited for."""

import re
from pathlib import Path

from tests.idioms.gallery import DDP, SHARES
from tests.idioms.running import TOPICS, judgements, topic

PAGE = Path(__file__).parents[2] / "docs" / "idioms.md"
BEGINNING = "<!-- from here on made by `python -m tests.idioms.table` -->"


def make() -> str:
    """A heading and a table for each topic, after a line that counts."""
    counted: dict[str, int] = {}
    tables = []
    for name in TOPICS:
        found = judgements(name, DDP, *SHARES)
        lines = [f"## {topic(name).title}", "", f"| idiom | {DDP} | " + " | ".join(SHARES) + " |", "|---|---|---|---|"]
        for idiom in topic(name).idioms:
            cells = [idiom.name]
            for mode in (DDP, *SHARES):
                verdict = found[mode, idiom.name].verdict
                counted[f"{mode} {verdict}"] = counted.get(f"{mode} {verdict}", 0) + 1
                cells.append(str(idiom.reason) if verdict == "sentence" else verdict)
            lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    total = sum(len(topic(name).idioms) for name in TOPICS)
    summary = ", ".join(f"{counted.get(f'{DDP} {v}', 0)} {v}" for v in ("equal", "differs", "fails", "hangs"))
    return "\n\n".join([f"Of {total} idioms, under plain DDP: {summary}.", *tables])


def read() -> list[list[str]]:
    """The rows of the page: name, plain DDP, and each of `SHARES`."""
    _, tables = PAGE.read_text().split(BEGINNING)
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*$", tables, re.MULTILINE)]
    return [row for row in rows if row[0] != "idiom"]


if __name__ == "__main__":
    text, _ = PAGE.read_text().split(BEGINNING)
    PAGE.write_text(f"{text}{BEGINNING}\n\n{make()}\n")
