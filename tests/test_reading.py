"""What tests/reading.py measures, of the source: its bounds, and that each measure sees what it is
for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reading import (
    CORE,
    MOST_BRANCHES,
    MOST_COLUMNS,
    MOST_CORE_LINES,
    MOST_FILE_LINES,
    MOST_FUNCTION_LINES,
    NOT_CORE,
    PACKAGE,
    Source,
    arrows,
    beside_core,
    circle,
    core,
    in_order,
    report,
    sources,
)

FILES = sources()
BENCHMARKS = sources(PACKAGE.parents[1] / "benchmarks")


def test_the_core_path_is_an_afternoons_reading() -> None:
    lines = {file.name: len(file.lines) for file in core(FILES)}
    assert {"models/decoder.py", "schedule/scheduler.py", "engine/engine.py"} <= set(lines)
    assert sum(lines.values()) <= MOST_CORE_LINES


def test_the_core_path_names_files_that_there_are() -> None:
    names = {file.name for file in FILES}
    assert {glob for glob in CORE if not any(Path(name).match(glob) for name in names)} == set()
    assert names >= NOT_CORE


def test_what_the_core_path_imports_is_counted_beside_it() -> None:
    files = [
        source("from moebius.engine import sampler\n", "engine/engine.py"),
        source("from moebius import errors\n", "engine/sampler.py"),
        source("", "errors.py"),
    ]
    assert [file.name for file in beside_core(files)] == ["engine/sampler.py"]


def test_files_are_short() -> None:
    long = {file.name for file in FILES if len(file.lines) > MOST_FILE_LINES}
    assert long == set()


def test_lines_are_short() -> None:
    wide = {
        f"{file.name}:{number}"
        for file in FILES
        for number, line in enumerate(file.lines, 1)
        if len(line) > MOST_COLUMNS
    }
    assert wide == set()


def test_functions_are_short() -> None:
    long = {
        f"{file.name}: {function.name}"
        for file in FILES
        for function in file.functions
        if function.lines > MOST_FUNCTION_LINES
    }
    assert long == set()


def test_functions_have_few_branches() -> None:
    forked = {
        f"{file.name}: {function.name}"
        for file in FILES
        for function in file.functions
        if function.branches > MOST_BRANCHES
    }
    assert forked == set()


def test_a_statement_has_one_target() -> None:
    assert offenders(Source.several_targets) == {}
    crammed = {file.name: file.several_targets() for file in BENCHMARKS}
    assert {name: lines for name, lines in crammed.items() if lines} == {}


def test_nothing_is_listed_only_to_be_splatted() -> None:
    assert offenders(Source.splats_of_displays) == {}


def offenders(found_in: Callable[[Source], list[int]]) -> dict[str, list[int]]:
    """The lines that are found in each file, for those with any."""
    return {file.name: lines for file in FILES if (lines := found_in(file))}


def test_no_files_import_one_another_in_a_ring() -> None:
    ring = circle(arrows(FILES))
    assert ring == [], " > ".join(ring)


def test_the_report_has_every_measure() -> None:
    text = report(FILES[::8])
    for measure in ("core path", "longest function", "tokens a line", "comments", "circle"):
        assert measure in text


def source(text: str, name: str = "part.py") -> Source:
    return Source(name, text)


@pytest.mark.parametrize(
    "statement",
    [
        "a, b = 1, 2",
        "self.a, self.b = x, y",
        "a, b = (1,) * 2 if late else (3, 4)",
        "a, b = (f(x) for x in rows)",
        "[a, b] = [f(x) for x in rows]",
        "room, held = 3, [[] for _ in range(2)]",
    ],
)
def test_statements_with_several_targets_are_seen(statement: str) -> None:
    assert source(f"x = 1\n{statement}\n").several_targets() == [2]


@pytest.mark.parametrize(
    "statement",
    ["a, b = f()", "a, b = b, a", "a, *rest = row", "a = (1, 2)", "a, b = zip(*rows)", "a[0] = 1"],
)
def test_taking_one_value_apart_is_no_such_statement(statement: str) -> None:
    assert source(statement).several_targets() == []


def test_splats_of_displays_are_seen() -> None:
    text = "f(*(a, b), **{'c': d})\ng = [*[a], *rest]\nh = [*rest, *(x for x in y)]\n"
    assert source(text).splats_of_displays() == [1, 1, 2]
    assert source("f(**{name: value}, **options)").splats_of_displays() == []


def test_functions_are_found_wherever_they_stand() -> None:
    text = "class A:\n    def f(self):\n        def g():\n            pass\n        return g\n"
    assert source(text).functions == [("A.f", 4, 1), ("A.f.g", 2, 1)]


def test_branches_are_counted() -> None:
    """if, elif, for, the comprehension and the handler, and one."""
    text = (
        "def f(x):\n    if x:\n        return [y for y in x]\n    elif y:\n        pass\n"
        "    for y in x:\n        try:\n            g()\n        except OSError:\n            pass\n"
    )
    assert [function.branches for function in source(text).functions] == [6]


def test_files_are_read_from_the_ground_up() -> None:
    files = [source("from moebius import b\n", "a.py"), source("", "b.py")]
    assert [file.name for file in in_order(files)] == ["b.py", "a.py"]


def test_lines_comments_and_tokens_are_counted() -> None:
    text = '"""A file.\n\nOf two words.\n"""\n\n# Why.\nx = (\n    1\n)  # what\n'
    file = source(text)
    assert len(file.lines) == 9
    assert file.code_lines == 3
    assert file.comments == 2
    assert file.code_tokens == 6  # the docstring, x, =, (, 1, )


def test_rings_are_found_also_among_imports_for_types() -> None:
    one = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moebius.two import X\n"
    files = [
        source(one, "one.py"),
        source("def f():\n    import moebius.three\n", "two.py"),
        source("from moebius import one\n", "three.py"),
        source("from moebius.one import Y\n", "four.py"),
    ]
    assert circle(arrows(files))[:-1] in (
        [f"moebius.{n}" for n in ring]
        for ring in (["one", "two", "three"], ["two", "three", "one"], ["three", "one", "two"])
    )
    assert circle(arrows([files[0], files[1], files[3]])) == []


def test_a_package_is_its_init_file() -> None:
    files = [source("", "ops/__init__.py"), source("from moebius.ops import x", "nn/rope.py")]
    assert arrows(files) == {"moebius.ops": set(), "moebius.nn.rope": {"moebius.ops"}}


def test_sources_are_read_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "nn").mkdir()
    (tmp_path / "nn" / "rope.py").write_text("x = 1\n")
    (file,) = sources(tmp_path)
    assert (file.name, file.module, file.lines) == ("nn/rope.py", "moebius.nn.rope", ["x = 1"])
