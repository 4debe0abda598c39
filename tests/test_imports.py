"""Rooms import earlier rooms only, and the first ones stay free of what they do not need."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_hetero"

PURE = (
    *("malloc", "plan", "step_time", "allocation", "outlook", "history", "balancer", "memory", "weighting", "planner"),
    *("tally", "profiles", "evaluation_plan"),
)
TORCH = (
    *("stream", "sampler", "timing", "tasks", "loss_count", "batch_norm", "sync_batch_norm", "borrowing", "buffers"),
    *("probe", "limits", "device_memory", "cutting", "nothing", "evaluation_sampler", "masks", "window"),
    "same_data",
)
DISTRIBUTED = ("collectives", "agreement", "failures", "training_step", "recovery", "metric_sync")
LIGHTNING = (
    *("attachment", "layer_sync", "learnt", "survival", "communicating", "evaluating", "loaders"),
    *("results", "truth", "metrics", "checkpoint", "monitor", "observer", "strategy"),
)
OUTERMOST = ("accelerator", "__init__", "ray", "report", "demo", "command_line", "cli")

# Order matters: a room may import those to the left of it. A new file has to find its place here.
ROOMS = PURE + TORCH + DISTRIBUTED + LIGHTNING + OUTERMOST

THIRD_PARTY = {room: {"numpy"} for room in PURE}
THIRD_PARTY |= {room: {"numpy", "torch", "torchmetrics"} for room in TORCH + DISTRIBUTED}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST, package: str = "lightning_hetero") -> Iterator[str]:
    """Dotted names of what is imported anywhere in a file, also in functions and for type checking only."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parent = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                yield from (".".join([*parent, *([module] if module else []), alias.name]) for alias in names)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield "torch.distributed"


def violations(room: str, source: str, package: str = "lightning_hetero") -> list[str]:
    """What a room's source imports although its place in the house forbids it."""
    found = []
    for name in imported(ast.parse(source), package):
        top, _, rest = name.partition(".")
        if top == "lightning_hetero":
            other = rest.split(".")[0]
            if other not in ROOMS:
                other = "__init__"
            if ROOMS.index(other) > ROOMS.index(room):
                found.append(f"{room} imports {name}, a later room")
        elif room in THIRD_PARTY and top not in THIRD_PARTY[room] | sys.stdlib_module_names:
            found.append(f"{room} imports {name}; of third parties it may import {sorted(THIRD_PARTY[room])}")
        elif room in TORCH and f"{name}.".startswith("torch.distributed."):
            found.append(f"{room} uses {name}, and talks to no other rank")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_place_in_the_house():
    assert {room_of(file) for file in FILES} - set(ROOMS) == set(), "place the new room in ROOMS"


@pytest.mark.parametrize(
    "file", [file for file in FILES if room_of(file) in ROOMS], ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_rooms_import_earlier_rooms_only(file):
    package = ".".join(["lightning_hetero", *file.relative_to(PACKAGE).parts[:-1]])
    assert violations(room_of(file), file.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("plan", "import torch"),
        ("plan", "from lightning_hetero.allocation import allocate"),
        ("plan", "from lightning_hetero import HeteroStrategy"),
        ("plan", "from .allocation import allocate"),
        ("plan", "from . import allocation"),
        ("allocation", "def f():\n    import lightning_hetero.balancer"),
        ("sampler", "import torch.distributed as dist"),
        ("sampler", "import torch\ntorch.distributed.barrier()"),
        ("sampler", "from torch import distributed"),
        ("sampler", "from torch.distributed import barrier"),
        ("loss_count", "import torchgeo.trainers"),
        ("collectives", "import lightning.pytorch"),
        ("strategy", "if TYPE_CHECKING:\n    from lightning_hetero.cli import main"),
    ],
)
def test_a_forbidden_import_is_found(room, source):
    assert violations(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("balancer", "import math\nimport numpy as np\nfrom lightning_hetero.plan import Plan"),
        ("sampler", "import torch.utils.data\nfrom .plan import Plan"),
        ("collectives", "import torch.distributed as dist"),
        ("strategy", "from lightning.pytorch.strategies import DDPStrategy\nfrom lightning_hetero import loaders"),
        ("cli", "from lightning_hetero import HeteroStrategy, demo"),
    ],
)
def test_an_allowed_import_is_left_alone(room, source):
    assert violations(room, source) == []
