"""README and docs/: links lead somewhere, commands exist, tables are what the records say, and README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from prometheus_client.parser import text_string_to_metric_families

import tables
from models.test_parity import CASES as PARITY
from moebius.cli.commands import app
from moebius.engine.client import ExpertLoads, ExpertSpread, LayerLoad, LayerSpread, RankSpread
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.engine.plan_words import human_bytes
from moebius.files import package_table
from moebius.models.family import gguf_architectures, model_types
from moebius.models.hub import BUNDLED, resolve_model
from moebius.parallel.traffic import Traffic
from moebius.request.params import LIMITS, SamplingParams
from moebius.server.limits import HTTP_LIMITS
from moebius.server.metrics import FINISHED_REASONS, REJECTIONS, ServerMetrics
from schedule.seeded_bugs import BUGS
from server.serving import engine

ROOT = Path(__file__).parent.parent

PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
MARKDOWN = MarkdownIt("commonmark").enable("table")
# Where a command ends and something else begins, as in `moebius serve MODEL | tee log`.
COMMAND = re.compile(r"(?<![\w./-])(?:\.venv/bin/|-m )?moebius((?: [^\s`|&;#<]+)+)")


@cache
def markdown(text: str) -> list[Token]:
    return MARKDOWN.parse(text)


def tokens(path: Path) -> Iterator[Token]:
    """A page's tokens, those inside of paragraphs, headings and cells among them."""
    for token in markdown(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def anchors(path: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    parsed = markdown(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for opening, inline in pairwise(parsed):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            fragment = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(fragment if fragment not in found else f"{fragment}-1")
    return found


def links(path: Path) -> Iterator[str]:
    """Targets of links and pictures that are inside of the repository."""
    for token in tokens(path):
        target = token.attrs.get("href") or token.attrs.get("src")
        if isinstance(target, str) and not re.match(r"[a-z]+:", target):
            yield target


def broken(path: Path, root: Path = ROOT) -> list[str]:
    """Links of a page that leave `root`, or lead to no file or heading there."""
    wrong = []
    for target in links(path):
        name, _, fragment = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        inside = there.is_relative_to(root) and there.exists()
        if not inside or (fragment and fragment not in anchors(there)):
            wrong.append(target)
    return wrong


def commands(path: Path) -> Iterator[list[str]]:
    """The words behind `moebius` in each command that a page shows; a line that ends in a backslash goes on."""
    for token in tokens(path):
        shell = token.type == "fence" and token.info in ("", "sh")
        if shell or token.type == "code_inline":
            for found in COMMAND.finditer(token.content.replace("\\\n", " ")):
                yield found[1].split()


@cache
def all_commands() -> Any:
    return typer.main.get_command(app)


def options_of(words: list[str]) -> tuple[set[str], list[str]]:
    """The options that the command knows which the words name, and the words behind its name."""
    command: Any = all_commands()
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", ()):
        command = command.commands[rest.pop(0)]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {
        "--help",
        "--version",
    }
    return known, rest


def command_names() -> set[str]:
    command: Any = all_commands()
    return set(command.commands)


def unknown(words: list[str]) -> list[str]:
    known, rest = options_of(words)
    return [word for word in rest if word.startswith("-") and word.split("=")[0] not in known]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_every_page_of_docs_is_reached_from_readme() -> None:
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert {path for path in PAGES if path.parent == ROOT / "docs"} <= reached


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`, three!\n\n## One\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](#here) [d](none.md) [e](other.md#two) [f](../up.md)"
        " ![g](none.png) [h](https://example.org)\n\n# Here\n"
    )
    assert broken(page, tmp_path) == ["none.md", "other.md#two", "../up.md", "none.png"]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_commands_that_are_shown_exist(path: Path) -> None:
    known = command_names()
    for words in commands(path):
        named = words[0].startswith("-") or words[0].isupper() or words[0] in known
        assert named and unknown(words) == [], " ".join(["moebius", *words])


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_files_that_are_named_exist(path: Path) -> None:
    """Scripts, recipes, records and tests, by their path from the root."""
    named = set(
        re.findall(
            r"\b(?:benchmarks|recipes|tests|src)/[\w/.-]*\.\w+\b", path.read_text(encoding="utf-8")
        )
    )
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_files_of_the_code_that_are_named_exist() -> None:
    """`ops/interface.py` and `pool.cpp`, as ARCHITECTURE names them: by the end of their path."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./])((?:\w+/)*\w+\.(?:py|toml|cpp|h))\b", text)
    there = [
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "csrc", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.*")
    ]
    assert {
        name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in there)
    } == set()


def test_an_option_that_is_not_there_is_found() -> None:
    assert unknown(["bench", "serve", "--request-rate", "4", "--rate=5", "-x"]) == [
        "--rate=5",
        "-x",
    ]
    assert unknown(["serve", "MODEL", "--no-enable-prefix-caching", "--port=1"]) == []


def test_options_in_the_text_are_options_of_some_command() -> None:
    """`--drain-timeout` alone, as running text names options of `moebius serve` and others."""
    page = ROOT / "docs" / "operating.md"
    bare = {
        token.content.split()[0].split("=")[0]
        for token in tokens(page)
        if token.content.startswith("--")
    }
    known: set[str] = set()
    for name in command_names():
        known |= options_of([name])[0]
    assert bare and bare <= known


@pytest.mark.parametrize("name", tables.PAGES)
def test_tables_are_what_the_records_say(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count("<!-- made by benchmarks/tables.py") == text.count("<!-- end -->") > 0
    assert tables.rendered(text) == text, "run .venv/bin/python benchmarks/tables.py"


def test_the_chart_shows_the_figures_of_its_record() -> None:
    """matplotlib writes each text beside its outlines, as a comment."""
    written = set(re.findall("<!-- (.*?) -->", tables.CHART.read_text(encoding="utf-8")))
    record = tables.beside.records("avx512")[tables.CHART_RECORD]
    for one in tables.beside.comparisons(tables.CHART_RECORD, record):
        if one.measure != tables.beside.TTFT:
            assert {tables.number(value) for value in one.values.values()} <= written


def test_the_counts_on_the_page_are_those_of_the_tests() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    [bugs] = re.findall(r"^\| bugs seeded .*? \| (\d+) \|", text, re.MULTILINE)
    assert int(bugs) == len(BUGS)
    [(types, configurations)] = re.findall(r"(\d+) model types, (\d+) configurations", text)
    assert int(configurations) == len(PARITY)
    assert int(types) == len({model_type for _, model_type, _ in PARITY})


def test_reference_names_every_sampling_parameter() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert {
        name for name, field in SamplingParams.__dataclass_fields__.items() if field.init
    } <= named


def test_the_plan_that_is_shown_has_todays_rows() -> None:
    """All but what depends on the machine: memory that is free, processors, kernels."""
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"moebius plan bundled\n(.*?)```", text, re.DOTALL)
    config = EngineConfig(kv_cache_memory_bytes=384 * 2**20)
    for what, size, remark in prepare(resolve_model(BUNDLED), config).rows():
        assert f"\n{what} " in shown
        if what in ("weights", "KV cache", "context") or what.startswith("sequences"):
            assert f"{size}  {remark}\n" in shown


def test_operating_names_every_limit() -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    [section] = re.findall(r"bounded before it costs anything:(.*?)\n\n[^|]", text, re.DOTALL)
    named = set(re.findall(r"[\d,]+(?: [KM]iB)?", section))
    limits = asdict(HTTP_LIMITS) | asdict(LIMITS)
    del limits["priority"]  # what any integer may be
    for name, value in limits.items():
        shown = f"{value:,}"
        if name in ("header_bytes", "body_bytes", "bodies_bytes"):
            shown = human_bytes(value).replace(".0", "")
        assert shown in named, name


LOADS = ExpertLoads(5, (LayerLoad(3, 1, 8, 1.0, 0.0, 0.5, (), (7, 1), (7, 1)),))
SPREAD = ExpertSpread(
    epoch=1,
    moves=0,
    ranks=(RankSpread(0, True, Traffic()),),
    layers=(LayerSpread(3, ((0, 1),), 1.0, 1.0),),
)


def test_operating_names_every_metric_and_no_other() -> None:
    """Those of ranks and of experts too: what a server shows that has all of them."""
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    [table] = re.findall(r"\| metric \| kind .*?\n\n", text, re.DOTALL)
    cells = [line.split("|")[1] for line in table.strip().split("\n")[2:]]
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    fake = engine("hello")
    fake.expert_loads = lambda: LOADS  # type: ignore[method-assign]
    shown = ServerMetrics(fake, "m", spread=lambda: SPREAD).exposition().decode()
    series = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(shown)
        if not family.name.startswith(("process_", "vllm:"))
    }
    assert {name.removeprefix("moebius_") for name in series} == told
    assert {*FINISHED_REASONS, *REJECTIONS} <= set(re.findall(r"`(\w+)`", table))


def test_the_page_of_models_names_each_type_architecture_and_refusal() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    refused = set(package_table("models/keys.toml")["refused"]) - {"images", "llama4_text"}
    for name in {*model_types(), *gguf_architectures(), *refused}:
        assert f"`{name}`" in page, name
