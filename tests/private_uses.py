"""What the package touches that is private in Lightning, torch or torchmetrics, read from its source."""

import ast
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning_hetero

PACKAGE = Path(lightning_hetero.__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_", "_fields")  # of named tuples


@cache
def trees() -> dict[str, ast.Module]:
    """The package's files, by their paths in it."""
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to something: functions, classes, variables, and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_itself(node):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "vars(self).update":
            names |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
    return names


def on_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_uses(tree: ast.AST, here: set[str], anywhere: set[str]) -> Iterator[str]:
    """Private names in a file that are not the package's own.

    Args:
        tree: the file.
        here: names that it defines.
        anywhere: names that the package defines.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            # What another of the package's files keeps private is not touched either, so such a name is foreign.
            names, own = [node.attr], anywhere if on_itself(node) else here
        elif isinstance(node, ast.ImportFrom):
            names, own = [alias.name for alias in node.names], set()
        elif isinstance(node, ast.Call):
            names, own = [keyword.arg for keyword in node.keywords if keyword.arg is not None], anywhere
            if ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
                names += [one.value for one in node.args[1:2] if isinstance(one, ast.Constant)]
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value)
        ):
            names, own = node.value.split("."), set()  # a path, as of a patch
        else:
            continue
        yield from (name for name in names if is_private(name) and name not in own)


@cache
def uses() -> dict[str, list[str]]:
    """The files that use each foreign private name."""
    found: dict[str, set[str]] = defaultdict(set)
    anywhere = set().union(*map(defined, trees().values()))
    for file, tree in trees().items():
        for name in private_uses(tree, defined(tree), anywhere):
            found[name].add(file)
    return {name: sorted(files) for name, files in sorted(found.items())}


def overrides() -> dict[str, str]:
    """Private methods, and methods of Lightning's private classes, that the package overrides; the class that does."""
    found = {}
    for info in pkgutil.walk_packages([str(PACKAGE)], "lightning_hetero."):
        if info.name.endswith("__main__"):
            continue
        for _, owner in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            methods = {name for name, value in vars(owner).items() if inspect.isfunction(value)}
            for base in inspect.getmro(owner)[1:]:
                library = base.__module__.split(".")[0]
                if owner.__module__.startswith("lightning_hetero.") and library in (
                    "lightning",
                    "torch",
                    "torchmetrics",
                ):
                    for name in methods & vars(base).keys():
                        inside = library == "lightning" and is_private(base.__name__) and not name.startswith("__")
                        if is_private(name) or inside:
                            found[f"{base.__name__}.{name}"] = f"{owner.__module__}.{owner.__name__}"
    return found


def used_in(name: str) -> str:
    """Where a name occurs, also as the package's own version of it."""
    files = uses().get(name) or [file for file, tree in trees().items() if name in defined(tree)]
    return ", ".join(files)
