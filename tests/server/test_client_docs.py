"""The programs of README and of docs/clients.md for the official client, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moebius.models.hub import resolve_model
from serving import serving

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/clients.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(resolve_model("bundled"), "bundled") as made:
        yield made


def ran(programs: list[str], address: str) -> str:
    """What they print, one after the other in one process."""
    command = [sys.executable, "-c", "\n".join(programs).replace(ADDRESS, address)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.case("C2")
@pytest.mark.case("C3")
@pytest.mark.case("C5")
def test_the_official_clients_programs_run(address: str) -> None:
    section = PAGE.read_text().partition("\n## openai for Python\n")[2].partition("\n## ")[0]
    programs = re.findall("```python\n(.*?)```", section, re.DOTALL)
    assert len(programs) == 5 and all(ADDRESS in program for program in programs)
    said = ran(programs, address)
    # What the model says depends on the kernels; these lines do not.
    for line in (
        " 12 tokens",
        "0 35 0",
        "context_length_exceeded messages req-",
        "However, your messages resulted in 10010 tokens. Please reduce the length of the "
        "messages.",
        "{'finished: length': 32, 'left': 32}",
    ):
        assert line in said and line in section, said


def test_the_programs_of_the_readme_run(address: str) -> None:
    """One over HTTP, one with an LLM; what they print depends on the kernels."""
    programs = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(programs) == 2 and ADDRESS in programs[0]
    said = ran(programs, address)
    for line in ("def fibonacci(n): ", "class Stack: "):
        assert line in said
