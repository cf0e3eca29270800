"""moebius serve is two processes that end together, however the one in front ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from covering import chosen
from server.serving import http_request

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says who is whose child")


@contextmanager
def serve(model: Path, scratch: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The front and its port; the leader of a process group, as of a terminal's job."""
    scratch.mkdir()
    command = [sys.executable, "-m", "moebius", "serve", str(model), "--port", "0"]
    command += ["--kv-cache-memory-bytes", "4000000", *options]
    env = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as front:
        assert front.stderr is not None
        while "serving on" not in (line := front.stderr.readline()):
            assert line != ""
        try:
            yield front, int(re.findall(r":(\d+)/v1", line)[0])
        finally:
            front.kill()


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name: state, parent and more; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def children_of(parent: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if stat_of(pid)[1:2] == [str(parent)]]


def child_of(parent: int) -> int:
    (child,) = children_of(parent)
    return child


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while stat_of(pid)[:1] not in ([], ["Z"]):
        assert time.monotonic() < deadline, "the engine outlives its front"
        time.sleep(0.01)


def begun(port: int, n: int = 1) -> socket.socket:
    """A stream of `n` choices of a second or so, of which tokens have come."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    body = {"prompt": "x", "stream": True, "max_tokens": 400, "ignore_eos": True, "n": n}
    sock.sendall(http_request("/v1/completions", body))
    data = b""
    while b"text_completion" not in data:
        data += sock.recv(65536)
    return sock


def rest(sock: socket.socket) -> bytes:
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize(
    "how", chosen(["kill -9", "Ctrl-C", "two signals"], lambda how: how == "Ctrl-C")
)
def test_an_engine_ends_with_its_front(tiny_model: Path, tmp_path: Path, how: str) -> None:
    """A signal that reaches both has the front finish what is in flight first."""
    scratch = tmp_path / "scratch"
    with serve(tiny_model, scratch, "--max-num-seqs", "1") as (front, port):
        engine = child_of(front.pid)
        # One choice after the other, so that they outlast what is done meanwhile.
        with begun(port, 16 if how == "two signals" else 1) as sock:
            if how == "kill -9":
                front.kill()
            else:
                os.killpg(front.pid, signal.SIGINT)
            if how == "two signals":
                while b'"draining"' not in refusal(port):
                    pass
                os.killpg(front.pid, signal.SIGTERM)
            answered = b"data: [DONE]" in rest(sock)
        wait_until_gone(engine, 20 if how == "Ctrl-C" else 2)
        front.wait(20)
        assert front.stderr is not None
        said = front.stderr.read()
    assert answered is (how == "Ctrl-C")
    assert front.returncode == {"kill -9": -9, "Ctrl-C": 0, "two signals": 128 + 15}[how]
    assert "Traceback" not in said and "ERROR" not in said
    assert list(scratch.iterdir()) == [], "nothing stays"


@pytest.mark.parametrize(
    "when",
    chosen(["its process is there", "its weights are read"], lambda when: "read" in when),
)
def test_an_engine_ends_with_a_front_that_ends_while_it_starts(
    tiny_model: Path, tmp_path: Path, when: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "moebius", "serve", str(tiny_model), "--port", "0"]
    env = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as front:
        assert front.stderr is not None
        while when == "its weights are read" and "batch invariant" not in (
            line := front.stderr.readline()
        ):
            assert line != ""
        deadline = time.monotonic() + 60
        while not (engines := children_of(front.pid)):
            assert time.monotonic() < deadline
        front.kill()
        # Before it has connected it has to be imported, on a machine that may be busy.
        wait_until_gone(engines[0], 2 if when == "its weights are read" else 30)
    assert list(scratch.iterdir()) == [], "nothing stays"


def refusal(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(http_request("/v1/completions", {"prompt": "x", "max_tokens": 1}))
        return rest(sock)


def test_clients_outlive_engines(tiny_model: Path, tmp_path: Path) -> None:
    """A stopped engine is replaced; a stream goes on over the end of another, which comes with a
    signal to the server in the middle of it."""
    scratch = tmp_path / "scratch"
    with serve(tiny_model, scratch) as (front, port):
        engine = child_of(front.pid)
        Asked(port).answer()  # from here on its prompt is cached
        undisturbed = Asked(port).answer()
        assert undisturbed[2]["prompt_tokens_details"]["cached_tokens"] > 0
        os.kill(engine, signal.SIGSTOP)
        wait_for_ready(port, b"503")
        assert b'"status":"live"' in get(port, "/health/live")
        wait_for_ready(port, b"200")
        assert b"moebius_engine_restarts_total{" in get(port, "/metrics")
        second = child_of(front.pid)
        assert second != engine and stat_of(engine) == []
        Asked(port).answer()
        stream = Asked(port)
        stream.begin()
        os.kill(second, signal.SIGKILL)
        wait_for_ready(port, b"503")
        front.terminate()
        assert stream.answer() == undisturbed
        assert front.wait(60) == 0
    assert list(scratch.iterdir()) == [], "nothing stays"


@pytest.mark.losses
def test_ranks_end_with_their_front(tiny_model: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    with serve(tiny_model, scratch, "--ranks", "2") as (front, port):
        ranks = children_of(front.pid)
        assert len(ranks) == 2
        with begun(port):
            front.kill()
            deadline = time.monotonic() + 2
            for rank in ranks:
                wait_until_gone(rank, deadline - time.monotonic())
    assert list(scratch.iterdir()) == [], "nothing stays"


@pytest.mark.losses
def test_a_server_whose_engines_do_not_start_again_says_why(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    scratch = tmp_path / "scratch"
    with serve(model, scratch) as (front, _):
        weights = model / "model.safetensors"
        changed = weights.with_name("changed")
        changed.write_bytes(weights.read_bytes()[:-100])
        changed.rename(weights)
        os.kill(child_of(front.pid), signal.SIGKILL)
        assert front.wait(200) == 1
        assert front.stderr is not None
        last = front.stderr.read().splitlines()[-1]
    assert "moebius: engines were started 5 times" in last and "model.safetensors" in last
    assert list(scratch.iterdir()) == [], "nothing stays"


class Asked:
    """A streamed completion with a seed."""

    def __init__(self, port: int) -> None:
        body = {
            "prompt": "def fibonacci(n):" * 8,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 300,
            "seed": 5,
            "logprobs": 1,
            "ignore_eos": True,
        }
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._sock.sendall(http_request("/v1/completions", body))
        self._data = b""

    def begin(self) -> None:
        """Until tokens have come."""
        while b"text_completion" not in self._data:
            self._data += self._sock.recv(65536)

    def answer(self) -> tuple[str, list[float], dict[str, Any]]:
        """The whole text, its log-probabilities, and the usage."""
        with self._sock:
            while b"data: [DONE]" not in self._data:
                part = self._sock.recv(65536)
                assert part, "the stream is cut off"
                self._data += part
        lines = self._data.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        scores = [
            x for each in choices if each["logprobs"] for x in each["logprobs"]["token_logprobs"]
        ]
        return "".join(each["text"] for each in choices), scores, events[-1]["usage"]


def wait_for_ready(port: int, status: bytes) -> None:
    deadline = time.monotonic() + 120
    while ready(port) != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def get(port: int, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
        return rest(sock)


def ready(port: int) -> bytes:
    """The status of /health/ready."""
    return get(port, "/health/ready").split()[1]
