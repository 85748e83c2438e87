"""Rooms and files import each other in one direction, so that whichever of them is imported first, the import works.

Recipes and the workers of distributed tests, which run in processes of their own, import names that exist.
"""

import ast
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "rl_plugins").rglob("*.py")
}


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a file that run when it is imported: neither those of functions nor those for type checkers."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from run_at_import(statement.orelse)
            continue
        yield statement
        for inner in ("body", "orelse", "finalbody"):
            yield from run_at_import(getattr(statement, inner, []))


def imported_files(module: str) -> set[str]:
    """Modules of ours that `module` imports when it is imported. `from package import module` counts as the module."""
    found = set()
    for statement in run_at_import(ast.parse(FILES[module].read_text()).body):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module is not None:
            inner = {f"{statement.module}.{alias.name}" for alias in statement.names}
            found |= inner & FILES.keys() or {statement.module}
    return (found & FILES.keys()) - {module}


def room(module: str) -> str:
    """`rl_plugins.nn` of `rl_plugins.nn.attachment`."""
    return ".".join(module.split(".")[:2])


def test_files_import_each_other_in_one_direction() -> None:
    order = tuple(TopologicalSorter({module: imported_files(module) for module in FILES}).static_order())
    assert len(order) == len(FILES)
    assert order.index("rl_plugins.nn.attachment") < order.index("rl_plugins.nn")  # packages come after their files


def test_rooms_import_each_other_in_one_direction() -> None:
    rooms = {room(module): set[str]() for module in FILES}
    for module in FILES:
        rooms[room(module)] |= {room(other) for other in imported_files(module)} - {room(module), "rl_plugins"}
    order = tuple(TopologicalSorter(rooms).static_order())
    stairs = ["functional", "nn", "rollouts", "signals", "trl"]
    assert sorted(stairs, key=lambda name: order.index(f"rl_plugins.{name}")) == stairs


@pytest.mark.parametrize(
    "file", [*ROOT.glob("tests/workers/*.py"), *ROOT.glob("recipes/**/*.py")], ids=lambda file: file.name
)
def test_names_that_other_processes_import_exist(file: Path) -> None:
    wanted = {
        (statement.module, alias.name)
        for statement in ast.walk(ast.parse(file.read_text()))
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("rl_plugins")
        for alias in statement.names
    }
    missing = [
        f"{module}.{name}"
        for module, name in sorted(wanted)
        if f"{module}.{name}" not in FILES and not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []
