"""Every example in the documentation runs, and the map of the code leads to what is there.

An example that cannot run alone says so, on the line above it: `<!-- not run: reason -->`.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\s*)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
MAP = re.compile(r"^\| .+ \| `(?P<file>[\w/]+\.py)` \| (?P<names>.+) \|$", re.MULTILINE)


def examples():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in EXAMPLE.finditer(text):
            line = text.count("\n", 0, match.start("code")) + 1
            skip = [pytest.mark.skip(reason=f"not run: {match['reason']}")] if match["reason"] else []
            yield pytest.param(match["code"], id=f"{page.relative_to(ROOT)}:{line}", marks=skip)


@pytest.mark.parametrize("code", list(examples()))
def test_example_runs(code, tmp_path):
    """As a script of its own, because Lightning starts the other ranks by running the script again."""
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


def definitions(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions and classes of a file, and the methods of these as `Class.method`."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names |= {prefix + node.name, *definitions(node, f"{prefix}{node.name}.")}
    return names


@pytest.mark.parametrize("row", list(MAP.finditer((ROOT / "CONTRIBUTING.md").read_text())), ids=lambda row: row["file"])
def test_the_map_of_the_code_leads_there(row):
    """A file that was moved or a name that was changed has to be so in CONTRIBUTING.md too."""
    names = re.findall(r"`([\w.]+)`", row["names"])
    tree = ast.parse((ROOT / "lightning_hetero" / row["file"]).read_text())
    assert set(names) <= definitions(tree)
