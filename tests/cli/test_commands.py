"""The commands as a person runs them: what they print, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from covering import rest
from moebius.cli.main import main
from moebius.engine.supervisor import EngineProcess
from moebius.ops import select_ops
from moebius.ops.cache_spec import key_value_spec
from moebius.server.settings import ServerSettings


def moebius(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moebius", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert moebius(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("moebius: ") and err.count("\n") == 1, (out, err)
    return err


def test_plan_prints_what_the_headers_say(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        moebius(
            monkeypatch,
            "plan",
            str(model),
            "--json",
            "--tensors",
            "--kv-cache-memory-bytes",
            "1000000",
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    weights = load_file(model / "model.safetensors")
    assert plan["weights"]["mapped"] == sum(w.numel() * 4 for w in weights.values())
    ops, layers = select_ops("cpu", torch.float32), 2
    per_block = layers * ops.cache_bytes_per_block(key_value_spec(2, 8, torch.float32), 16)
    assert plan["bytes_per_token"] == per_block // 16
    assert plan["num_blocks"] == 1_000_000 // per_block
    assert all(tensor["mapped"] for tensor in plan["tensors"])
    assert moebius(monkeypatch, "plan", str(model), "--dtype", "bfloat16", "--tensors") == 0
    assert "copied" in capsys.readouterr().out


def test_plan_counts_a_cache_on_disk(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it takes of the memory; the directory is not made."""
    where = model / "kv"
    options = ("--kv-cache-disk", str(where), "--kv-cache-disk-bytes", "1000000000")
    assert moebius(monkeypatch, "plan", str(model), *options) == 0
    assert re.search(r"^KV cache on disk +\d+\.\d MiB +of memory", capsys.readouterr().out, re.M)
    assert not where.exists()
    assert moebius(monkeypatch, "plan", str(model), *options[:2]) == 2
    assert "kv_cache_disk_bytes go together" in capsys.readouterr().err


def test_a_plan_in_a_log_file_is_not_folded(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moebius(monkeypatch, "plan", str(model)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\S", line) for line in lines[1:]), (
        "each line begins with what it is about"
    )
    assert max(len(line) for line in lines) > 80 and not any(line.endswith(" ") for line in lines)


@pytest.mark.parametrize("group", [(), ("bench",)])
def test_the_list_of_commands_says_each_in_a_whole_sentence(
    group: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert moebius(monkeypatch, *group, "--help") == 0
    commands = capsys.readouterr().out.partition("\nCommands:\n")[2].splitlines()
    assert len(commands) >= 3 and all(
        re.fullmatch(r"  \w+ +[A-Z].*[^.]\.", line) for line in commands
    ), commands


def test_the_process_ends_with_its_code_and_loses_no_output(model: Path) -> None:
    def run(
        *arguments: str, stdout: int | IO[str] = subprocess.PIPE
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moebius", *arguments]
        return subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120
        )

    done = run("plan", str(model), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["num_blocks"] > 0 and done.stderr == ""
    with open("/dev/full", "w") as full:
        failed = run("version", stdout=full)
    assert failed.returncode != 0 and "No space left" in failed.stderr


def test_generate_prints_completions(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(model), "--max-tokens", "5", "--seed", "3"]
    assert moebius(monkeypatch, *arguments, "def f(") == 0
    first = capsys.readouterr().out
    assert first.startswith("def f(") and len(first) > len("def f(\n")
    assert moebius(monkeypatch, *arguments, "def f(", "-n", "2") == 0
    both = capsys.readouterr().out
    assert both.count("--- prompt 1, completion") == 2 and first.strip() in both


def test_generate_reads_stdin(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    assert moebius(monkeypatch, "generate", "--model", str(model), "--max-tokens", "2") == 0
    assert capsys.readouterr().out.startswith("from stdin")


def calls(path: Path, count: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for i in range(count):
        body = {"model": "m", "max_tokens": 4, "temperature": 0, "prompt": f"x{i}"}
        lines.append(
            {"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": body}
        )
    chat = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    lines.append(
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat}
    )
    lines.append(
        {
            "custom_id": "bad",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": "x", "top_p": 7},
        }
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_a_batch_file_is_answered_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    calls(source, 6)
    arguments = ("generate", "--model", str(model), "--batch", str(source), "--output", str(target))
    assert moebius(monkeypatch, *arguments) == 0
    assert "7 answered, 1 refused or failed" in capsys.readouterr().err
    results = {r["custom_id"]: r for r in map(json.loads, target.read_text().splitlines())}
    assert len(results) == 8
    assert results["c3"]["response"]["status_code"] == 200 and results["c3"]["error"] is None
    assert results["chat"]["response"]["body"]["object"] == "chat.completion"
    assert (
        results["bad"]["response"]["status_code"] == 400
        and results["bad"]["error"]["param"] == "top_p"
    )
    lines = target.read_text().splitlines()
    kept = "\n".join(lines[:5]) + "\n" + lines[5][:30]
    target.write_text(kept)
    assert moebius(monkeypatch, *arguments) == 0
    assert "5 answered before, 3 to go" in capsys.readouterr().err
    again = {r["custom_id"]: r for r in map(json.loads, target.read_text().splitlines())}
    assert target.read_text().startswith("\n".join(lines[:5])) and set(again) == set(results)
    texts = [
        {
            id: r["response"]["body"]["choices"][0]["text"]
            for id, r in one.items()
            if id[1:].isdigit()
        }
        for one in (results, again)
    ]
    assert texts[0] == texts[1]
    assert moebius(monkeypatch, *arguments) == 0
    assert "0 to go" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: Invalid JSON"),
        ("[]", "line 2: Input should be an object"),
        (
            '{"custom_id": "c0", "url": "/v1/completions", "body": {}}',
            "custom_id 'c0' was used before",
        ),
        (
            '{"custom_id": "a", "url": "/v1/embeddings", "body": {}}',
            "url: Input should be '/v1/completions', '/v1/chat/completions' or '/v1/responses'",
        ),
        (
            '{"custom_id": "", "url": "/v1/completions", "body": {}}',
            "custom_id: String should have at least 1 character",
        ),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": 3}',
            "body: Input should be an object",
        ),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}',
            "stream must be false",
        ),
    ],
)
def test_a_broken_batch_is_refused_whole(
    tmp_path: Path,
    line: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "in.jsonl"
    first = '{"custom_id": "c0", "url": "/v1/completions", "body": {"prompt": "x"}}\n'
    source.write_text(first + line + "\n")
    out = str(tmp_path / "out.jsonl")
    assert message in refused(
        monkeypatch, capsys, "generate", "--batch", str(source), "--output", out
    )
    assert "give it --output" in refused(monkeypatch, capsys, "generate", "--batch", str(source))
    assert not Path(out).exists()


def test_replay_says_whether_it_is_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    assert (
        moebius(
            monkeypatch,
            "generate",
            "--model",
            str(model),
            "--max-tokens",
            "5",
            "--trace",
            str(trace),
            "a",
            "b",
        )
        == 0
    )
    capsys.readouterr()
    assert moebius(monkeypatch, "replay", str(trace)) == 0
    assert "the same: " in capsys.readouterr().out
    trace.write_text(trace.read_text().replace('"chunks":[["0",0,1', '"chunks":[["0",0,2', 1))
    assert moebius(monkeypatch, "replay", str(trace)) == 1
    assert "different at step 1: chunks" in capsys.readouterr().out


def test_bad_models_are_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(*more: str) -> str:
        return refused(monkeypatch, capsys, "serve", str(model), "--port", "0", *more)

    assert "no/such/model" in refused(
        monkeypatch, capsys, "serve", "./no/such/model", "--port", "0"
    )
    # Told by an engine's process; commands that have none tell of the weights below.
    assert "--max-model-len" in line("--kv-cache-memory-bytes", "300000", "--max-model-len", "2048")
    assert "block_size is 0" in line("--block-size", "0")
    assert "use auto or none" in line("--generation-config", "some")
    assert "give an --api-key" in line("--host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refused(
            monkeypatch, capsys, "serve", str(model), "--port", port
        )
    (model / "tokenizer.json").rename(model / "kept.json")
    assert "tokenizer.json" in line()
    (model / "kept.json").rename(model / "tokenizer.json")
    weights = load_file(model / "model.safetensors")
    left_over = {**weights, "model.layers.7.extra.weight": weights["model.norm.weight"].clone()}
    save_file(left_over, model / "model.safetensors", metadata={"format": "pt"})
    generate = ("generate", "a", "--model", str(model))
    assert "model.layers.7.extra.weight" in refused(monkeypatch, capsys, *generate)
    save_file(
        {k: v for k, v in weights.items() if k != "model.norm.weight"},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "model.norm.weight" in refused(monkeypatch, capsys, *generate)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "gpt2" in refused(monkeypatch, capsys, *generate)


@pytest.mark.case("C25")
@pytest.mark.case("C18")
@pytest.mark.parametrize(
    "host, shown", [("::1", "[::1]"), rest("127.0.0.1", "127.0.0.1")], ids=["IPv6", "IPv4"]
)
def test_serve_says_where_once_it_answers_there(
    model: Path, tmp_path: Path, host: str, shown: str
) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        try:
            free.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
    command = [sys.executable, "-m", "moebius", "serve", str(model), "--host", host, "--port", "0"]
    command += ["--log-level", "debug", "--kv-cache-memory-bytes", "4000000"]
    (tmp_path / "scratch").mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path / "scratch")}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        lines: list[str] = []
        while "serving on" not in (line := child.stderr.readline()):
            assert line != "", lines
            lines.append(line)
        try:
            found = re.fullmatch(r"serving on (http://(.+):(\d+))/v1 as .+\n", line)
            assert found is not None and found[2] == shown
            with socket.create_connection((host, int(found[3])), timeout=5) as sock:
                sock.sendall(b"GET /health/live HTTP/1.1\r\n\r\n")
                assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
        finally:
            child.send_signal(signal.SIGTERM)
        lines += child.stderr.readlines()
    assert child.returncode == 0
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing stays"
    assert "moebius.server.run: draining: 0 calls in flight" in "".join(lines)
    loggers = re.findall(r"^\d{4}-\S+ \S+ [A-Z]+ ([\w.]+): ", "".join(lines), re.MULTILINE)
    assert loggers and all(name.startswith("moebius.") for name in loggers), loggers


@pytest.mark.case("C25")
def test_serve_says_nothing_of_a_port_that_it_did_not_get(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process takes the port while the model is loaded."""
    loads = EngineProcess.launch
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]

        def late(*arguments: Any, **options: Any) -> Any:
            other.listen()
            return loads(*arguments, **options)

        monkeypatch.setattr(EngineProcess, "launch", late)
        assert moebius(monkeypatch, "serve", str(model), "--port", str(port)) == 2
    err = capsys.readouterr().err
    assert f"moebius: cannot listen on 127.0.0.1:{port}: " in err and "serving on" not in err


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moebius(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(
        name in out for name in ("serve", "generate", "chat", "plan", "replay", "train", "version")
    )


def test_chat_keeps_the_conversation(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "", "/new", "again", "x" * 5000, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    arguments = (
        "chat",
        str(model),
        "--max-tokens",
        "4",
        "--temperature",
        "0",
        "--max-model-len",
        "512",
    )
    assert moebius(monkeypatch, *arguments) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) >= 2
    assert "context length is 512" in captured.err


def test_what_an_operator_chooses_reaches_the_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[ServerSettings] = []
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkey = "secret"\n')
    monkeypatch.setattr(
        "moebius.cli.serve._serve_on", lambda *given, **options: chosen.append(given[3])
    )
    serve = ("serve", str(model), "--port", "0")
    assert moebius(monkeypatch, *serve) == 0
    options = (
        "--unknown-fields",
        "warn",
        "--api-keys",
        str(keys),
        "--api-key",
        "a",
    )
    assert moebius(monkeypatch, *serve, *options) == 0
    monkeypatch.setenv("MOEBIUS_API_KEY", "one two")
    assert moebius(monkeypatch, *serve) == 0
    names = ("unknown_fields", "api_keys_file", "api_keys")
    assert [tuple(getattr(settings, name) for name in names) for settings in chosen] == [
        ("refuse", None, ()),
        ("warn", keys, ("a",)),
        ("refuse", None, ("one", "two")),
    ]
    capsys.readouterr()
    for option, value, word in (
        ("--unknown-fields", "ignore", "it must be one of refuse, warn"),
        ("--api-keys", str(keys.with_name("none.toml")), "No such file"),
    ):
        assert word in refused(monkeypatch, capsys, *serve, option, value)
    monkeypatch.delenv("MOEBIUS_API_KEY")
    assert "give an --api-key" in refused(monkeypatch, capsys, *serve, "--host", "0.0.0.0")


@pytest.mark.parametrize(
    "command", ["serve", "plan", "generate", "chat", "bench latency", "bench throughput"]
)
def test_who_reserves_a_cache_may_say_what_it_holds(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moebius(monkeypatch, *command.split(), "--help") == 0
    assert "--kv-cache-dtype" in capsys.readouterr().out
