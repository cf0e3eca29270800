"""Logs name ids and numbers, never prompts: not by the words of an exception either, which may
quote what failed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moebius.errors import EngineError, frames

SOURCE = Path(__file__).parent.parent / "src" / "moebius"
# What runs while requests are served. The rest is an operator's own command, on the operator's own
# data.
SERVING = ("engine", "schedule", "server", "text", "ops", "nn", "moe", "outputs.py", "llm.py")
FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] in SERVING
)


def test_no_log_call_prints_an_exceptions_words() -> None:
    printing = [
        f"{path.relative_to(SOURCE)}:{node.lineno}: use frames(error)"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr == "exception" and is_the_log(node.value))
        or (isinstance(node, ast.keyword) and node.arg == "exc_info")
    ]
    assert printing == []


def is_the_log(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "log"


def test_frames_say_where_and_of_what_kind_and_not_a_word_of_it() -> None:
    def inner(secret: str) -> None:
        raise KeyError(secret)

    def outer(secret: str) -> None:
        try:
            inner(secret)
        except KeyError as error:
            raise EngineError(f"because of {secret}") from error

    secret = "-".join(["tell", "nobody"])  # a frame shows its line of the source
    with pytest.raises(EngineError) as raised:
        outer(secret)
    text = frames(raised.value)
    assert secret not in text and text.index("KeyError") < text.index("EngineError")
    assert "in inner" in text and "in outer" in text
    during = ValueError(secret)
    during.__context__ = KeyError(secret)
    assert "KeyError" in frames(during) and secret not in frames(during)
    during.__cause__ = during.__context__
    during.__context__.__cause__ = during
    assert frames(during).count("ValueError") == 1
