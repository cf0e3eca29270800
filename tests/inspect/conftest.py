"""A small corpus of three kinds, and a report over it from the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import read_documents
from moebius.inspect.run import write_report

SETTINGS = InspectConfig(max_tokens=2000, row_length=64, step_tokens=256)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "fib.py").write_text(
        "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1)\n" * 40
    )
    (folder / "notes.txt").write_text("naïve café 😀 日本語 ok <script>alert(1)</script>\n" * 20)
    (folder / "more").mkdir()
    (folder / "more" / "read.md").write_text("# fibonacci\n\nreturn n if n < 2\n" * 10)
    return folder


@pytest.fixture(scope="session")
def report(
    tiny_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What report.json holds, read back; report["out"] is the directory."""
    out = tmp_path_factory.mktemp("out")
    returned = write_report(tiny_model, read_documents([corpus], 2000), out, SETTINGS)
    found = json.loads((out / "report.json").read_text())
    assert json.loads(json.dumps(returned)) == found
    return {**found, "out": out}
