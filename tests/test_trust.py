"""TRUST.md: each test and each command that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "TRUST.md").read_text()


def test_each_file_that_it_names_is_there() -> None:
    named = re.findall(r"(?:tests|benchmarks|docs)/[\w/]+\.(?:py|md)", TEXT)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_each_test_that_it_names_is_in_the_file_before_it() -> None:
    found = re.findall(r"`(tests/[\w/]+\.py)` \(([^)]*)\)", TEXT)
    assert len(found) > 10
    for path, names in found:
        tests = re.findall(r"test_\w+", names)
        text = (ROOT / path).read_text()
        assert tests and all(f"def {name}(" in text for name in tests), (path, names)


def test_each_class_of_faults_has_a_test() -> None:
    table = TEXT.partition("## Classes of known faults")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 15
    assert all("`tests/" in row for row in rows)
