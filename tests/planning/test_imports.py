"""Planning is usable where nothing but numpy is installed."""

import pkgutil
import subprocess
import sys

import pytest

import lightning_hetero.planning

MODULES = sorted(module.name for module in pkgutil.iter_modules(lightning_hetero.planning.__path__))
MISSING = ["torch", "lightning", "torchmetrics", "torchgeo", "matplotlib"]

# `None` in `sys.modules` is how Python itself marks what can't be imported.
SCRIPT = """
import importlib, sys
sys.modules.update(dict.fromkeys({missing}))
importlib.import_module("lightning_hetero.planning.{module}")
print(sorted({{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names))
"""

REPL = """
from lightning_hetero.planning.planner import SplitPlanner
from lightning_hetero.planning.shares import Shares
print(SplitPlanner(Shares.parse([3, 1]), world_size=2, global_batch=64).schedule.newest.local_batches)
"""


def printed(script: str) -> str:
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("module", MODULES)
def test_every_module_of_planning_can_be_imported_without_torch(module: str) -> None:
    """Fails if a module of planning, or the package's own `__init__`, imports torch or something that needs it."""
    imported = printed(SCRIPT.format(missing=MISSING, module=module))
    assert "lightning_hetero" in imported
    assert not any(f"'{name}'" in imported for name in ["jsonargparse", "torchvision", "scipy"])


def test_a_plan_can_be_made_without_torch() -> None:
    assert "(48, 16)" in printed(f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n{REPL}")


def test_importing_the_package_registers_the_strategy_where_lightning_is_installed() -> None:
    script = "import lightning_hetero\nfrom lightning.pytorch.strategies import StrategyRegistry\n"
    assert "hetero_spawn" in printed(script + "print(StrategyRegistry.available_strategies())")
