"""The commands on a GGUF file: the answers of the directory that it was made of."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cli.test_commands import moebius
from cli.test_commands import refused as refusal
from models.gguf_writing import Converter, tokenizer_keys
from moebius import LLM, SamplingParams
from moebius.cli.serve import ServeOptions
from moebius.text import load_text

PROMPT = "def fibonacci(n):"
FLAGS = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12"]
SMALL = ["--kv-cache-memory-bytes", "1000000", "--threads", "1"]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A directory, and alone in another one a file with all that it says."""
    directory = tmp_path_factory.mktemp("source") / "tiny"
    shutil.copytree(tiny_model, directory)
    alone = tmp_path_factory.mktemp("alone")
    Converter(directory).save(alone / "tiny-F32.gguf", tokenizer_keys(directory))
    return directory, alone / "tiny-F32.gguf"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command that succeeds: what it prints."""

    def run(*arguments: str) -> str:
        assert moebius(monkeypatch, *arguments) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command that is refused: why."""
    return partial(refusal, monkeypatch, capsys)


def test_generate_and_chat_say_the_same_of_both(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, said: Command
) -> None:
    answers = [
        said("generate", PROMPT, "--model", str(path), *FLAGS, *SMALL)
        for path in (*both, both[1].parent)
    ]
    assert answers[0].startswith(PROMPT) and len(answers[0]) > len(PROMPT) + 1
    assert answers[1:] == answers[:1] * 2
    talks = []
    for path in both:
        typed = iter(["hello", "/quit"])
        monkeypatch.setattr("builtins.input", lambda _, typed=typed: next(typed))
        options = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "8"]
        talks.append(said("chat", str(path), *options, "--max-model-len", "99"))
    assert talks[0] == talks[1] != "\n"


def test_llm_takes_a_file(both: tuple[Path, Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    options = {"dtype": "float32", "kv_cache_memory_bytes": 10**6}
    texts = []
    for path in both:
        with LLM(str(path), **options) as llm:
            assert llm.default_params() == llm.default_params(temperature=1.0)
            texts.append(llm.chat([{"role": "user", "content": "hi"}], params)[0].outputs[0].text)
    with LLM(str(both[1].parent), file="F32", tokenizer=str(both[0]), **options) as llm:
        texts.append(llm.chat([{"role": "user", "content": "hi"}], params)[0].outputs[0].text)
    assert texts == texts[:1] * 3


def test_plan_says_what_the_file_holds(both: tuple[Path, Path], said: Command) -> None:
    found = said("plan", str(both[1]), *SMALL[:2])
    weights = next(line for line in found.splitlines() if line.startswith("weights"))
    assert "0 B copied" in weights
    quantised = both[1].with_name("q") / "tiny-Q8_0.gguf"
    quantised.parent.mkdir()
    from gguf import GGMLQuantizationType as Type

    shutil.copytree(both[0], quantised.parent / "source")
    Converter(
        quantised.parent / "source", lambda place: Type.F16 if "down" in place else Type.Q8_0
    ).save(quantised)
    found = said("plan", str(quantised), *SMALL[:2])
    formats = next(line for line in found.splitlines() if line.startswith("formats"))
    assert re.search(r"KiB q8_0, .* KiB float16, .* KiB float32", formats)


def test_inspect_takes_a_file(both: tuple[Path, Path], tmp_path: Path, said: Command) -> None:
    (tmp_path / "text.txt").write_text("def fibonacci(n):\n    return n\n" * 20)
    reports = []
    for path in both:
        out = tmp_path / path.name
        arguments = [
            str(path),
            str(tmp_path / "text.txt"),
            "--out",
            str(out),
            "--max-tokens",
            "200",
        ]
        said("inspect", *arguments)
        report = json.loads((out / "report.json").read_text())
        reports.append(report["layers"])
    assert reports[0] == reports[1]


def test_serve_answers_under_the_files_name(both: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "moebius", "serve", str(both[1]), "--port", "0", *SMALL]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        address = next(
            found[1]
            for line in server.stderr
            if (found := re.search(r"serving on (http://\S+)/v1 as tiny-F32$", line.rstrip()))
        )
        with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
            names = [each["id"] for each in json.load(answer)["data"]]
        assert names == ["tiny-F32", str(both[1])]
        body = {
            "model": "tiny-F32",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 3,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] > 0
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_names_that_are_served() -> None:
    def names(model: str) -> tuple[str, ...]:
        return ServeOptions().settings(model).served_model_names

    assert names("org/name") == ("org/name",)
    assert names("/data/m-Q4_K_M.gguf") == ("m-Q4_K_M", "/data/m-Q4_K_M.gguf")
    assert names("m-00001-of-00002.gguf") == ("m", "m-00001-of-00002.gguf")
    assert ServeOptions(served_model_name=["x"]).settings("m.gguf").served_model_names == ("x",)


def test_bad_files_are_one_line(
    both: tuple[Path, Path], tmp_path: Path, said: Command, refused: Command
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(both[1].read_bytes()[:5000])
    assert "bad.gguf: " in refused("plan", str(bad))
    assert "truncated" in refused("serve", str(bad))
    bad.write_bytes(b"no such thing")
    for command in (["plan"], ["serve"], ["chat"], ["generate", "x", "--model"]):
        words = refused(*command, str(bad))
        assert "13 bytes are no GGUF file" in words
    assert "no file" in refused("plan", str(tmp_path / "no.gguf"))
    shutil.copy(both[1], tmp_path / "good.gguf")
    listed = refused("chat", str(tmp_path))
    assert "choose one by --file: bad.gguf (0.013 kB), good.gguf (" in listed
    said("plan", str(tmp_path), "--file", "good", *SMALL[:2])


def test_a_tokenizer_beside_a_file_is_its_own_or_none(
    both: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, file = both
    path = Path(shutil.copy(file, tmp_path / "tiny.gguf"))
    own = load_text(path)
    assert own.tokenizer.encode(PROMPT) == load_text(directory).tokenizer.encode(PROMPT)
    assert own.defaults.eos_ids == {0, 2}
    shutil.copy(directory / "tokenizer.json", tmp_path)
    beside = load_text(path).tokenizer
    assert beside.encode(PROMPT) == own.tokenizer.encode(PROMPT)
    assert beside.has_chat_template, "a directory without one gets the file's"
    assert caplog.text == ""
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    other["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    again = load_text(path).tokenizer
    assert again.encode(PROMPT) == own.tokenizer.encode(PROMPT)
    assert "the tokenizer.json beside it is another model's" in caplog.text
    given = load_text(path, tmp_path).tokenizer
    assert given.encode(PROMPT) != own.tokenizer.encode(PROMPT), "what is asked for is used"
    assert "has other tokens than tiny.gguf was trained with" in caplog.text


def test_a_tokenizer_with_more_tokens_than_a_directorys_model_is_told_of(
    both: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, _ = both
    load_text(directory, directory)
    assert caplog.text == ""
    narrow = Path(shutil.copytree(directory, tmp_path / "narrow"))
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    load_text(narrow, directory)
    assert "has other tokens than narrow was trained with" in caplog.text


def test_a_file_without_a_tokenizer_is_given_one(
    both: tuple[Path, Path], tmp_path: Path, said: Command, refused: Command
) -> None:
    directory, file = both
    shutil.copytree(directory, tmp_path / "source")
    (tmp_path / "bare").mkdir()
    bare = tmp_path / "bare" / "tiny.gguf"
    Converter(tmp_path / "source").save(bare)
    arguments = ["generate", PROMPT, *FLAGS, *SMALL, "--model"]
    words = refused(*arguments, str(bare))
    assert "--tokenizer" in words and "tokenizer.json" in words
    wanted = said(*arguments, str(file))
    for tokenizer in both:
        given = ["--tokenizer", str(tokenizer)]
        assert said(*arguments, str(bare), *given) == wanted


def test_benchmarks_take_a_file(both: tuple[Path, Path], said: Command) -> None:
    sizes = ["--input-len", "4", "--output-len", "2", *SMALL]
    run = ["bench", "throughput", "--model", str(both[1]), "--num-prompts", "2", *sizes]
    assert "Total num output tokens:  4" in said(*run)
    run = ["bench", "latency", "--model", str(both[1].parent), "--file", "F32", "--num-iters", "1"]
    found = said(*run, "--num-iters-warmup", "0", *sizes)
    assert "Avg latency" in found
