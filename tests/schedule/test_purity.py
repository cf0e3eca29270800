"""schedule/ decides without tensors, without a clock and without I/O."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moebius.schedule

FILES = sorted(Path(moebius.schedule.__file__).parent.glob("*.py"))
FORBIDDEN = {
    "torch",
    "numpy",
    "time",
    "datetime",
    "timeit",
    "os",
    "io",
    "socket",
    "asyncio",
    "threading",
    "logging",
}


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "__import__"
        ):
            names.add("torch")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_neither_tensors_nor_clock(path):
    names = imported(ast.parse(path.read_text()))
    assert {name.split(".")[0] for name in names} & FORBIDDEN == set()
    ours = {name for name in names if name.startswith("moebius")}
    below = ("moebius.errors", "moebius.request.", "moebius.schedule.")
    assert all(name.startswith(below) for name in ours)


def test_there_is_something_to_look_at():
    assert {path.name for path in FILES} >= {
        "request.py",
        "blocks.py",
        "waiting.py",
        "scheduler.py",
    }
