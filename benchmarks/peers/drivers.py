"""Driver processes from the outside: which peers there are, and how one is started, asked, parked
and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause import PauseClock
from sizes import BF16, OPENVINO

HERE = Path(__file__).resolve().parent
OURS = "moebius"
ANSWER_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Peer:
    """A driver script, the virtual environment under PEERS that runs it (None: that of run.py), and
    the names of the file or directory that it reads of a model, by how weights are stored."""

    script: str
    venv: str | None
    files: Mapping[str, str]

    def reads(self, models: Path, model: str, weights: str) -> Path:
        """The model's file or directory; KeyError where it has no such weights."""
        return models / self.files[weights].format(model)


GGUF = {weights: f"{{}}-{weights}.gguf" for weights in ("q8_0", "q4_k_m", "mxfp4")}
PEERS: dict[str, Peer] = {
    OURS: Peer("drive_moebius.py", None, {BF16: "{}", **GGUF}),
    "vllm": Peer("drive_vllm.py", "venv-vllm", {BF16: "{}"}),
    "openvino": Peer("drive_openvino.py", "venv-ov", OPENVINO),
    "llama.cpp": Peer("drive_llama.py", None, {BF16: "{}-bf16.gguf", **GGUF}),
    "transformers": Peer("drive_transformers.py", "venv-hf", {BF16: "{}"}),
}


class DriverError(Exception):
    """A driver ended, failed or did not answer in time; the message names its log."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How the drivers of one phase are started."""

    model: str
    weights: str
    max_seqs: int
    threads: int
    prefix_cache: bool


class Driver:
    """One running driver. Parked, its process group is stopped, so that it cannot disturb another's
    turn."""

    def __init__(self, name: str, setting: Setting, folder: Path) -> None:
        peer = PEERS[name]
        self.name = name
        self.log = folder / "logs" / f"{name}-{setting.model}-{setting.weights}.log"
        self.log.parent.mkdir(exist_ok=True)
        self.pauses = PauseClock(folder / f".clock-{os.getpid()}-{name}")
        python = sys.executable if peer.venv is None else str(folder / peer.venv / "bin" / "python")
        command = [
            python,
            str(HERE / peer.script),
            "--model",
            setting.model,
            "--models",
            str(folder / "models"),
        ]
        command += ["--weights", setting.weights]
        command += ["--max-seqs", str(setting.max_seqs), "--threads", str(setting.threads)]
        command += ["--prefix-cache"] * setting.prefix_cache
        _read_through(peer.reads(folder / "models", setting.model, setting.weights))
        start = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(folder, peer, self.pauses),
                start_new_session=True,
            )
        self.group = self._process.pid
        self.warm: set[str] = set()
        try:
            ready = self._answer()["ready"]
            seconds = time.perf_counter() - start
            self.ask({"workload": "token", "draw": 1})
            cold = time.perf_counter() - start
        except BaseException:
            self.stop()
            raise
        self.details: dict[str, Any] = {**ready, "start_s": seconds, "first_token_s": cold}

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One workload; raises DriverError."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DriverError(f"{self.name} ended; see {self.log}") from None
        return self._answer()

    def park(self) -> None:
        """Stand still until the next question."""
        self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """End the process and what it started; asked kindly first."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self.pauses.remove()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_SECONDS)[0]:
            raise DriverError(
                f"{self.name} did not answer within {ANSWER_SECONDS} s; see {self.log}"
            )
        line = self._process.stdout.readline()
        if not line:
            raise DriverError(f"{self.name} ended; see {self.log}")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)


def _environment(folder: Path, peer: Peer, pauses: PauseClock) -> dict[str, str]:
    environment = dict(
        os.environ, PEERS=str(folder), PEERS_CLOCK=str(pauses.path), PYTHONUNBUFFERED="1"
    )
    if peer.venv == "venv-vllm":
        # What vLLM's documentation asks for on CPUs, where it is installed. Without, it decodes a
        # fifth slower.
        openmp = folder / "venv-vllm" / "lib" / "libiomp5.so"
        allocator = find_library("tcmalloc_minimal")
        preloaded = []
        if openmp.exists():
            preloaded.append(str(openmp))
        if allocator:
            preloaded.append(allocator)
        environment["LD_PRELOAD"] = ":".join(preloaded)
    return environment


def _read_through(path: Path) -> None:
    """Bring a model's files into the page cache, so that every start finds them there. Raises
    DriverError."""
    if not path.exists():
        raise DriverError(f"{path} is missing; README.md says how to make it")
    for file in [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]:
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
