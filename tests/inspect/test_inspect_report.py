"""The page, the verdict, the command, and one clear line for what cannot be inspected."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from covering import rest
from moebius.cli.main import main
from moebius.errors import ConfigError, NumericalError, StorageError, UsageError
from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import Document, read_documents
from moebius.inspect.run import page, verdict, write_report
from oracle import saved_tiny
from tiny import write_model, write_tokenizer

from .conftest import SETTINGS

VOID = {"meta", "rect", "line", "br", "circle", "polyline"}
DOCUMENTS = [Document("one", "a", "def fibonacci(n): return n\n" * 30)]


class Page(HTMLParser):
    """Tags that are open, and everything that an attribute or a style would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert self.open == []
        self.loads += re.findall(r"url\(|@import|https?://", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [
            str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith("#")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())


def test_the_page_is_whole_loads_nothing_and_escapes(report: dict[str, Any]) -> None:
    text = (report["out"] / "report.html").read_text()
    parsed = Page(text)
    assert parsed.loads == [] and "script" not in parsed.seen
    assert parsed.seen.count("svg") >= 8 and parsed.seen.count("details") == 2
    for word in (
        "MaxVio",
        "Coefficient of variation",
        "Mutual information",
        "Co-activation",
        "Imbalance",
        "capacity factor",
    ):
        assert word.lower() in text.lower()
    for finding in report["verdict"]:
        assert finding["text"].replace("'", "&#39;") in text


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts_per_tok": 1, "num_experts": 2, "num_hidden_layers": 1},
        {"num_experts_per_tok": 4, "num_experts": 40, "num_hidden_layers": 6},
        rest({"num_experts_per_tok": 4, "num_experts": 40, "num_hidden_layers": 20}),
        {"num_experts": 5, "num_experts_per_tok": 5},
    ],
    ids=["one layer, top-1 of 2", "6 layers of 40", "20 layers of 40", "every expert"],
)
def test_other_sizes_make_a_page_too(sizes: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "model", **sizes)
    report = write_report(tmp_path / "model", DOCUMENTS, tmp_path, SETTINGS)
    parsed = Page((tmp_path / "report.html").read_text())
    assert parsed.loads == [] and parsed.seen.count("rect") < 40_000
    assert (report["coactivation"] is None) == (sizes["num_experts_per_tok"] == 1)
    assert len(report["layers"]) == sizes.get("num_hidden_layers", 2)
    assert len((tmp_path / "report.html").read_bytes()) < 6_000_000


def test_layers_without_a_router_are_left_out(tmp_path: Path) -> None:
    write_model(tmp_path / "model", mlp_only_layers=[0], num_hidden_layers=3)
    report = write_report(tmp_path / "model", DOCUMENTS, tmp_path, SETTINGS)
    assert [layer["layer"] for layer in report["layers"]] == [1, 2] and report["model"][
        "layers"
    ] == 3


def findings(report: dict[str, Any], **changes: Any) -> dict[str, str]:
    """Findings by state, of a report whose layers are changed."""
    layers = [{**layer, **changes} for layer in report["layers"]]
    found = verdict({**report, "layers": layers, "floor": changes.get("floor", 0.01)})
    return {
        state: " ".join(f["text"] for f in found if f["state"] == state)
        for state in ("good", "fair", "poor", "note")
    }


def test_the_verdict_says_what_is_wrong(report: dict[str, Any]) -> None:
    good = findings(
        report,
        max_violation=0.2,
        dead=[],
        mutual_information=0.7,
        largest_logit=8.0,
        bfloat16_changed=0,
    )
    assert (
        good["fair"] == good["poor"] == ""
        and "load is even" in good["good"]
        and "No expert is dead" in good["good"]
    )
    assert "1.70 times an even share" in findings(report, max_violation=0.7)["fair"]
    bad = findings(
        report, max_violation=2.5, dead=[1, 3], mutual_information=0.001, largest_logit=300.0
    )
    assert "unbalanced" in bad["poor"] and "4 of 8 experts are dead" in bad["poor"]
    assert "layer 0: 1, 3; layer 1: 1, 3" in bad["poor"] and "hardly looks" in bad["poor"]
    assert "z-loss" in bad["fair"]
    assert "few for 4 experts" in findings(report, floor=0.4)["fair"]
    assert "12.0 % of the tokens" in findings(report, bfloat16_changed=0.12)["note"]


def test_a_page_of_dead_experts_and_a_second_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    report = write_report(tiny_model, DOCUMENTS, tmp_path, SETTINGS, against=tiny_model, name="<b>")
    report["layers"][0]["dead"] = [2]
    text = page(report)
    assert Page(text).loads == [] and "<b>:" not in text and 'class="left poor">2<' in text
    assert "Saturation" in text


def dense(folder: Path) -> None:
    write_model(folder, mlp_only_layers=[0, 1])


def broken(folder: Path) -> None:
    write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")


def single(folder: Path) -> None:
    write_model(folder, num_experts=1, num_experts_per_tok=1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (dense, ConfigError, "is dense: it has no router"),
        (single, ConfigError, "a single expert each"),
        (broken, NumericalError, "layer 1: the router's logits"),
    ],
)
def test_models_that_cannot_be_inspected(
    make: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "model")
    with pytest.raises(error, match=message):
        write_report(tmp_path / "model", DOCUMENTS, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "another shape, num_layers 3 and not 2"),
        ({"hidden_size": 16}, "another shape, hidden_size 16 and not 32"),
        ({"num_experts": 8}, "another shape in its experts or routers"),
        ({"num_experts_per_tok": 1}, "another shape in its experts or routers"),
    ],
)
def test_checkpoints_of_another_shape(
    tiny_model: Path, changes: Any, message: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "other", **changes)
    with pytest.raises(ConfigError, match=message):
        write_report(tiny_model, DOCUMENTS, tmp_path, SETTINGS, against=tmp_path / "other")


def test_a_checkpoint_of_another_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other")
    write_tokenizer(tmp_path / "other", vocab_size=262)
    with pytest.raises(ConfigError, match="its tokenizer gives the text other tokens"):
        write_report(tiny_model, DOCUMENTS, tmp_path, SETTINGS, against=tmp_path / "other")


@pytest.mark.parametrize(
    "settings",
    [{"max_tokens": 0}, {"row_length": 1}, {"step_tokens": 0}, {"capacity_factor": (1.0, 0.0)}],
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        InspectConfig(**settings)


def test_ranks() -> None:
    assert InspectConfig().ranks_for(8) == [2, 4] and InspectConfig().ranks_for(60) == [2, 4]
    assert InspectConfig().ranks_for(3) == [] and InspectConfig(ranks=(3, 2)).ranks_for(8) == [2, 3]
    with pytest.raises(
        ConfigError, match=r"ranks is \[9\]; 8 experts can be spread over 2 to 8 ranks"
    ):
        InspectConfig(ranks=(9,)).ranks_for(8)


def test_a_place_that_cannot_be_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file cannot be made a directory: File exists"):
        write_report(tiny_model, DOCUMENTS, tmp_path / "file", SETTINGS)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        StorageError, match=r"report\.json cannot be written: No space left on device"
    ):
        write_report(tiny_model, DOCUMENTS, tmp_path / "out", SETTINGS)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.case("C13")
def test_only_reports_are_replaced(tiny_model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        write_report(tiny_model, DOCUMENTS, tmp_path, SETTINGS)
    for name in ("report.json", "report.html"):
        report = (tmp_path / name).read_text()
        (tmp_path / name).write_text("my own report")
        with pytest.raises(ConfigError, match=f"{name} holds something else"):
            write_report(tiny_model, DOCUMENTS, tmp_path, SETTINGS)
        assert (tmp_path / name).read_text() == "my own report"
        (tmp_path / name).write_text(report)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moebius", "inspect", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command(
    tiny_model: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [str(corpus / "fib.py"), str(corpus / "notes.txt")]
    out = tmp_path / "a" / "b"
    sizes = (
        "--max-tokens",
        "500",
        "--row-length",
        "32",
        "--ranks",
        "3",
        "--capacity-factor",
        "1.1",
    )
    assert run(monkeypatch, str(tiny_model), "--text", *files, "--out", str(out), *sizes) == 0
    printed = capsys.readouterr().out
    assert "The load is" in printed and "report.html" in printed
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json"}
    assert "in rows of 32" in (out / "report.html").read_text()
    assert run(monkeypatch, str(tiny_model), "--out", str(out)) == 2
    captured = capsys.readouterr()
    assert (
        captured.err
        == "moebius: name the text to run through the model: --text FILES or directories\n"
    )


@pytest.mark.case("C10")
def test_a_router_that_masks_groups_is_reported(corpus: Path, tmp_path: Path) -> None:
    """dots1's scores of masked groups are minus infinity, which JSON has not."""
    model = saved_tiny(
        tmp_path, "dots1", vocab_size=320, n_routed_experts=6, n_group=3, topk_group=2
    )
    write_tokenizer(tmp_path)
    write_report(tmp_path, read_documents([corpus], 500), tmp_path / "out", SETTINGS)
    text = (tmp_path / "out" / "report.json").read_text()
    router = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
        "router"
    ]
    assert (router["num_groups"], router["group_fill"]) == (model.config.n_group, "never")
    assert "dots1" in (tmp_path / "out" / "report.html").read_text()
