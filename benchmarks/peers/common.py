"""What the drivers share: a clock, time stamps, memory, and the loop that answers run.py.

A driver is a process that loads one model in one engine. It reads requests from standard input and
answers on standard output, one JSON object a line; whatever libraries print goes to standard error.

    -> (started)                        <- {"ready": {"load_s": ..., "version": ..., ...}}
    -> {"workload": "w1", "draw": 0}    <- {"wall": ..., "first": [...], "last": [...], "memory":
                                        {...}}
    -> end of file                         the driver ends
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sizes import BF16, SIZES, weights_of
from workloads import Request, Workload, workload

# Most tokens of one sequence in any workload, with room for the engines' own rounding.
MAX_MODEL_LEN = 2304
# Tokens of one step, for the engines that ask.
MAX_STEP_TOKENS = 2048
KV_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Options:
    """What run.py asks of a driver."""

    model: str
    directory: Path
    """Of the weights: a GGUF file where they are not in bfloat16."""
    weights: str
    max_seqs: int
    threads: int
    prefix_cache: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds since the requests were handed over: to the end, and of each request's first and last
    token.

    The lists are empty where an engine does not show its tokens as they come.
    """

    wall: float
    first: list[float]
    last: list[float]


@dataclass(slots=True)
class Engine:
    """A loaded engine: `run` computes all requests of a workload; `details` say what it is and how
    it was set up.

    `memory` adds figures of its own to the process's.
    """

    run: Callable[[Workload], Timing]
    details: dict[str, Any]
    memory: Callable[[Peak], dict[str, float]] | None = None
    close: Callable[[], None] = lambda: None


class Load(Protocol):
    def __call__(self, options: Options) -> Engine: ...


def _pauses() -> Callable[[], float]:
    path = os.environ.get("PEERS_CLOCK")
    if path is None:
        return lambda: 0.0
    with open(path, "rb") as file:
        shared = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    return lambda: struct.unpack("d", shared)[0]


_paused = _pauses()


def clock() -> float:
    """Seconds, less those for which pause.py had this process stopped."""
    return time.perf_counter() - _paused()


class Stamps:
    """When the tokens of each request came."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.counts = [0] * len(work.requests)
        self._first = [0.0] * len(work.requests)
        self._last = [0.0] * len(work.requests)
        self._start = clock()

    def saw(self, index: int, count: int) -> None:
        """`count` new tokens of request `index` are there now."""
        if count == 0:
            return
        now = clock() - self._start
        if self.counts[index] == 0:
            self._first[index] = now
        self._last[index] = now
        self.counts[index] += count

    def finish(self) -> Timing:
        """Everything is there. Raises RuntimeError if an engine made more or fewer tokens than
        asked."""
        wall = clock() - self._start
        wanted = [request.output for request in self.work.requests]
        if self.counts != wanted:
            raise RuntimeError(f"{self.work.name}: wanted {wanted} tokens, got {self.counts}")
        return Timing(wall, self._first, self._last)


@dataclass(slots=True)
class Peak:
    """Most resident memory so far, in GB, of a process and its children. `total` is the peak of the
    sum; `anonymous` and `file` (mapped files and shared memory) are each the peak of its own."""

    total: float = 0.0
    anonymous: float = 0.0
    file: float = 0.0

    def add(self, sample: tuple[float, float]) -> None:
        anonymous, file = sample
        self.total = max(self.total, anonymous + file)
        self.anonymous = max(self.anonymous, anonymous)
        self.file = max(self.file, file)


def resident() -> tuple[float, float]:
    """(anonymous, file) resident memory of this process and its children now, in GB."""
    anonymous = 0
    file = 0
    for process in [os.getpid(), *_children(os.getpid())]:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue  # it has ended since
        for line in lines:
            name, _, value = line.partition(":")
            if name == "RssAnon":
                anonymous += int(value.split()[0])
            elif name in ("RssFile", "RssShmem"):
                file += int(value.split()[0])
    return anonymous * 1024 / 1e9, file * 1024 / 1e9


def _children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found + [grandchild for child in found for grandchild in _children(child)]


def watch_memory(peak: Peak, interval: float = 0.2) -> None:
    """Sample resident memory from a thread, for as long as the process lives."""

    def sample() -> None:
        while True:
            peak.add(resident())
            time.sleep(interval)

    threading.Thread(target=sample, daemon=True).start()


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, also if it is stopped
    then (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def serve(load: Load) -> None:
    """A driver's main program: load, then answer until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, choices=SIZES)
    parser.add_argument(
        "--models",
        type=Path,
        default=None,
        help="folder of the checkpoints (default: PEERS/models)",
    )
    parser.add_argument("--weights", default=BF16, help="bf16, or a GGUF file's type")
    parser.add_argument("--max-seqs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix-cache", action="store_true")
    given = parser.parse_args()
    models = given.models or peers_folder() / "models"
    options = Options(
        given.model,
        weights_of(models, given.model, given.weights),
        given.weights,
        given.max_seqs,
        given.threads,
        given.prefix_cache,
    )

    end_with_parent()
    # Where memory runs out, the engine that took too much is to end, not its neighbours.
    Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peak = Peak()
    watch_memory(peak)
    start = clock()
    engine = load(options)
    _answer(answers, {"ready": {"load_s": clock() - start, **engine.details}})
    try:
        for line in sys.stdin:
            work = _asked(options, json.loads(line))
            timing = engine.run(work)
            peak.add(resident())
            memory = asdict(peak) | (engine.memory(peak) if engine.memory else {})
            _answer(answers, {**asdict(timing), "memory": memory})
    finally:
        engine.close()


def peers_folder() -> Path:
    """The folder of the environment variable PEERS: models/, one virtual environment per peer,
    builds."""
    if "PEERS" not in os.environ:
        sys.exit("set PEERS to the folder of the models and the peers' environments (README.md)")
    return Path(os.environ["PEERS"]).resolve()


def _asked(options: Options, question: dict[str, Any]) -> Workload:
    if question["workload"] == "token":
        return Workload("token", [Request(list(range(300, 316)), 1)], concurrency=1)
    return workload(question["workload"], SIZES[options.model].vocab, question["draw"])


def _answer(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()
