"""How much there is to read, and how it reads: the measures of readability, by the syntax trees.

`python tests/reading.py` prints them; tests/test_reading.py holds the source to them.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

PACKAGE = Path(__file__).parent.parent / "src" / "moebius"

MOST_CORE_LINES = 4000
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_BRANCHES = 12
MOST_COLUMNS = 100

# The path of one request: what schedules it, the engine's loop, and what the model computes.
CORE = (
    "schedule/*.py",
    "engine/engine.py",
    "engine/batch.py",
    "engine/runner.py",
    "models/decoder.py",
    "nn/*.py",
    "moe/*.py",
    "ops/interface.py",
    "ops/steps.py",
    "ops/formats/dense.py",
    "ops/formats/format.py",
    "ops/weights.py",
    "ops/program.py",
)
# Built from csrc.
COMPILED = {"moebius._cpu"}
# What only training uses, where experts lie, whose turn it is among several owners of requests (with
# one, that is their order), what waits for a disk, drafted tokens (which are off by default, and
# change none), and what only some models have: recurrent layers, narrower experts, a dense part
# beside experts. A mixer (nn/mixers/) is read by who wants to know that mixer, as a family is.
NOT_CORE = {
    "nn/packed.py",
    "moe/beside.py",
    "moe/crossing.py",
    "moe/on_host.py",
    "moe/training.py",
    "moe/losses.py",
    "moe/capacity.py",
    "moe/latent.py",
    "moe/noise.py",
    "moe/health.py",
    "moe/placement.py",
    "moe/ranks.py",
    "moe/share.py",
    "schedule/drafts.py",
    "schedule/states.py",
    "schedule/tiered_drafts.py",
    "schedule/tiers.py",
    "schedule/turns.py",
}

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


_BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.match_case,
    ast.comprehension,
)


class Function(NamedTuple):
    """A function by its qualified name.

    lines      from `def` to its end
    branches   cyclomatic complexity: the ways that a branch opens, and one
    """

    name: str
    lines: int
    branches: int


@dataclass(frozen=True)
class Source:
    """One file of the package; `name` is its path there, such as "nn/rope.py"."""

    name: str
    text: str

    @property
    def module(self) -> str:
        parts = self.name.removesuffix(".py").split("/")
        return ".".join(["moebius", *(part for part in parts if part != "__init__")])

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @property
    def comments(self) -> int:
        return sum(token.type == tokenize.COMMENT for token in self.tokens)

    @property
    def code_tokens(self) -> int:
        """Tokens that are code; a docstring is one."""
        return sum(token.type not in _NOT_CODE for token in self.tokens)

    @cached_property
    def code_lines(self) -> int:
        """Lines with code on them, docstrings, comments and blank lines left out."""
        docstrings = set(_docstring_lines(self.tree))
        lines: set[int] = set()
        for token in self.tokens:
            if token.type not in _NOT_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
        return len(lines - docstrings)

    @cached_property
    def functions(self) -> list[Function]:
        return list(_functions(self.tree, ""))

    def several_targets(self) -> list[int]:
        """The lines of statements that give several targets a value each, where each could have a
        line of its own. Taking one value apart is none of them, nor is a swap."""
        return [node.lineno for node in ast.walk(self.tree) if _is_crammed(node)]

    def splats_of_displays(self) -> list[int]:
        """The lines of `*(a, b)` and `**{"a": b}`, which say no more than `a, b` and `a=b` do."""
        found = []
        for node in ast.walk(self.tree):
            match node:
                case ast.Starred(value=ast.Tuple() | ast.List() | ast.Set()):
                    found.append(node.lineno)
                case ast.keyword(arg=None, value=ast.Dict(keys=keys)):
                    if all(isinstance(key, ast.Constant) for key in keys):
                        found.append(node.lineno)
        return found

    def imports(self, modules: set[str]) -> set[str]:
        """The modules of the package that this one names in an import, wherever that stands."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    names.add(submodule if submodule in modules | COMPILED else node.module)
        return names & modules - {self.module}


def sources(package: Path = PACKAGE) -> list[Source]:
    """Every Python file of the package, by name."""
    return [
        Source(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]


def core(files: list[Source]) -> list[Source]:
    """The files of one request's path."""
    return [
        file
        for file in files
        if file.name not in NOT_CORE and any(Path(file.name).match(glob) for glob in CORE)
    ]


def beside_core(files: list[Source]) -> list[Source]:
    """The files that one request's path imports and that are not on it: what its reader meets by
    name alone."""
    path = core(files)
    graph = arrows(files)
    met = set().union(*(graph[file.module] for file in path)) - {file.module for file in path}
    return [file for file in files if file.module in met]


def arrows(files: list[Source]) -> dict[str, set[str]]:
    """For each module those that it imports."""
    modules = {file.module for file in files}
    return {file.module: file.imports(modules) for file in files}


def in_order(files: list[Source]) -> list[Source]:
    """Files so that each imports only those before it; by name where imports form a ring."""
    graph = arrows(files)
    if circle(graph):
        return files
    place = {module: i for i, module in enumerate(TopologicalSorter(graph).static_order())}
    return sorted(files, key=lambda file: place[file.module])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring, the first again at the end; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def _docstring_lines(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                yield from range(first, last + 1)


def _functions(node: ast.AST, inside: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _functions(child, inside)
            continue
        name = f"{inside}{child.name}"
        if not isinstance(child, ast.ClassDef):
            assert child.end_lineno is not None
            branches = 1 + sum(isinstance(node, _BRANCHES) for node in ast.walk(child))
            yield Function(name, child.end_lineno - child.lineno + 1, branches)
        yield from _functions(child, f"{name}.")


def _is_crammed(node: ast.AST) -> bool:
    match node:
        case ast.Assign(targets=[ast.Tuple() | ast.List() as target], value=value):
            swap = isinstance(value, ast.Tuple) and _texts(target) == _texts(value)
            return _makes_several(value) and not swap
    return False


def _texts(display: ast.Tuple | ast.List) -> list[str]:
    return sorted(map(ast.unparse, display.elts))


def _makes_several(value: ast.expr) -> bool:
    """Whether an expression lists values: a display, a comprehension, or a choice between such."""
    match value:
        case ast.Tuple() | ast.List() | ast.GeneratorExp() | ast.ListComp():
            return True
        case ast.IfExp(body=body, orelse=orelse):
            return _makes_several(body) or _makes_several(orelse)
        case ast.BinOp(left=left, right=right):
            return _makes_several(left) or _makes_several(right)
    return False


def _total(files: list[Source]) -> int:
    return sum(len(file.lines) for file in files)


def report(files: list[Source]) -> str:
    """The measures, a line each."""
    path = core(files)
    lines = _total(files)
    code = sum(file.code_lines for file in files)
    wide = sum(len(line) > MOST_COLUMNS for file in files for line in file.lines)
    longest_file = max(files, key=lambda file: len(file.lines))
    functions = [(function, file.name) for file in files for function in file.functions]
    longest, longest_in = max(functions, key=lambda pair: pair[0].lines)
    forked, forked_in = max(functions, key=lambda pair: pair[0].branches)
    tenths = quantiles([function.lines for function, _ in functions], n=10)
    beside = beside_core(files)
    asked = [file for file in files if file.name.startswith("request/")]
    rows = [
        ("core path", f"{_total(path)} lines of {MOST_CORE_LINES}, in {len(path)} files"),
        ("imported by it", f"{_total(beside)} lines, in {len(beside)} files that are not on it"),
        ("with what a front asks", f"{_total(path) + _total(asked)} lines, request/ among them"),
        ("package", f"{lines} lines, {code} of them code, in {len(files)} files"),
        ("longest file", f"{longest_file.name}, {len(longest_file.lines)} lines"),
        ("functions", f"{tenths[4]:.0f} lines at the median, {tenths[8]:.0f} at 90 %"),
        ("longest function", f"{longest_in}: {longest.name}, {longest.lines} lines"),
        ("most branches", f"{forked_in}: {forked.name}, {forked.branches}"),
        ("tokens a line", f"{sum(file.code_tokens for file in files) / code:.1f}"),
        (
            "comments",
            f"{100 * sum(file.comments for file in files) / code:.1f} per 100 lines of code",
        ),
        ("beyond 100 columns", f"{100 * wide / lines:.2f} % of lines"),
        ("several targets", f"{sum(len(file.several_targets()) for file in files)} statements"),
        ("splats of displays", f"{sum(len(file.splats_of_displays()) for file in files)}"),
        ("circle of imports", " > ".join(circle(arrows(files))) or "none"),
        ("", ""),
        ("the core path, as it builds up", ""),
        *((f"  {file.name}", f"{len(file.lines)} lines") for file in in_order(path)),
    ]
    return "\n".join(f"{what:<32} {figure}".rstrip() for what, figure in rows)


if __name__ == "__main__":
    print(report(sources()))
