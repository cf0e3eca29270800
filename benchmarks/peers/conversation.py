"""A conversation of several turns about a document: the time to each turn's first token, here and
in llama.cpp's server, and how much of the prompt each computed again, as both say themselves.

    PEERS=... .venv/bin/python benchmarks/peers/conversation.py --model qwen3.5-35b-28 \\
        --weights q4_k_m --json benchmarks/peers/conversation/qwen3.5-35b-28.json

`keeps`: a turn's prompt is the one before, its answer as it was, and a question (token ids, plain
completions). `drops`: a chat, whose template leaves an answer's thinking out of the next prompt, so
that this parts from the one before where the answer began. llama-server runs with its prompt cache
and its checkpoints of recurrent states; both servers have one model in memory at a time, and answer
one request at a time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from common import end_with_parent, peers_folder
from llama_server import LlamaServer
from sizes import SIZES, weights_of

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from records import processor, save  # noqa: E402

DOCUMENT = 4000
QUESTION = 40
ANSWER = 64
"""Tokens of each; of an answer whose thinking is left out, QUESTION are left."""
CONTEXT = 8192
START_SECONDS = 300
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """first_s: until there was a first token. computed: of the prompt's tokens, those that were not
    found."""

    first_s: float
    prompt: int
    computed: int


class Server(Protocol):
    """One of the two engines, with a model loaded."""

    def complete(self, prompt: list[int]) -> tuple[Turn, list[int]]:
        """ANSWER tokens behind a prompt, and which they are."""

    def chat(self, messages: list[Message]) -> Turn:
        """As many, behind the template's text."""


def timed(response: http.client.HTTPResponse, facts: dict[str, Any]) -> tuple[float, list[int]]:
    """When the first event with a token came, by the clock, and all tokens; keeps the usage."""
    first = 0.0
    ids: list[int] = []
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        facts.update(event.get("usage") or {})
        ids += [i for choice in event["choices"] for i in choice.get("token_ids") or []]
        if ids and not first:
            first = time.perf_counter()
    return first, ids


class Llama:
    """llama-server, whose timings tell what it computed, and for how long: no time is counted that
    requests take on their way."""

    def __init__(self, server: LlamaServer) -> None:
        self._server = server

    def complete(self, prompt: list[int]) -> tuple[Turn, list[int]]:
        body = {
            "prompt": prompt,
            "n_predict": ANSWER,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": True,
            "return_tokens": True,
        }
        found = self._server.ask("/completion", body)
        return self._turn(found["timings"]), found["tokens"]

    def chat(self, messages: list[Message]) -> Turn:
        body = {
            "messages": messages,
            "max_tokens": ANSWER,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": True,
        }
        return self._turn(self._server.ask("/v1/chat/completions", body)["timings"])

    @staticmethod
    def _turn(timings: Mapping[str, Any]) -> Turn:
        computed = timings["prompt_n"]
        return Turn(timings["prompt_ms"] / 1000, computed + timings["cache_n"], computed)


class Moebius:
    """`moebius serve`, whose usage tells what it found; times are the client's."""

    def __init__(self, port: int) -> None:
        self._port = port

    def complete(self, prompt: list[int]) -> tuple[Turn, list[int]]:
        return self._ask("/v1/completions", {"prompt": prompt})

    def chat(self, messages: list[Message]) -> Turn:
        return self._ask("/v1/chat/completions", {"messages": messages})[0]

    def _ask(self, path: str, asked: Mapping[str, Any]) -> tuple[Turn, list[int]]:
        body = {
            **asked,
            "model": "m",
            "max_tokens": ANSWER,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=START_SECONDS)
        start = time.perf_counter()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"moebius: {response.status} {response.read()[:500]!r}")
        usage: dict[str, Any] = {}
        first, ids = timed(response, usage)
        prompt = usage["prompt_tokens"]
        found = usage["prompt_tokens_details"]["cached_tokens"]
        return Turn(first - start, prompt, prompt - found), ids


@contextmanager
def llama(model: Path, threads: int, log: Path) -> Iterator[Server]:
    settings = {
        "--threads": threads,
        "--threads-batch": threads,
        "--parallel": 1,
        "--ctx-size": CONTEXT,
        "--batch-size": 2048,
        "--ubatch-size": 512,
        "--flash-attn": "on",
        "--cache-ram": 2048,
        "--log-file": log,
    }
    program = peers_folder() / "llama-build" / "bin" / "llama-server"
    with closing(LlamaServer(program, model, settings, ["--jinja"])) as server:
        yield Llama(server)


@contextmanager
def moebius(model: Path, threads: int, log: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moebius", "serve", str(model), "--port", str(port)]
    command += ["--threads", str(threads), "--served-model-name", "m"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "4"]
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=end_with_parent)
    try:
        end = time.monotonic() + START_SECONDS
        while not _ready(port):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"moebius did not start; see {log}")
            time.sleep(0.1)
        yield Moebius(port)
    finally:
        server.terminate()
        server.wait(30)


def _ready(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


ENGINES = {"llama.cpp": llama, "moebius": moebius}


def keeps(server: Server, turns: int, vocab: int, draw: int) -> list[Turn]:
    drawn = random.Random(f"keeps {draw}")

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(300, vocab - 64) for _ in range(count)]

    prompt = tokens(DOCUMENT)
    found = []
    for _ in range(turns):
        prompt += tokens(QUESTION)
        turn, answer = server.complete(prompt)
        prompt += answer
        found.append(turn)
    return found


def drops(server: Server, turns: int, vocab: int, draw: int) -> list[Turn]:
    drawn = random.Random(f"drops {draw}")

    def text(count: int) -> str:
        """Each letter is a token of the benchmark's vocabulary."""
        return "".join(drawn.choice(string.ascii_lowercase) for _ in range(count))

    messages = [{"role": "system", "content": text(DOCUMENT)}]
    found = []
    for _ in range(turns):
        messages.append({"role": "user", "content": text(QUESTION)})
        found.append(server.chat(messages))
        messages.append({"role": "assistant", "content": text(QUESTION)})
    return found


KINDS = {"keeps": keeps, "drops": drops}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=SIZES)
    parser.add_argument("--weights", default="q4_k_m")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = peers_folder()
    model = weights_of(folder / "models", given.model, given.weights)
    (folder / "logs").mkdir(exist_ok=True)
    record: dict[str, Any] = {
        "processor": processor(),
        "model": given.model,
        "weights": given.weights,
        "threads": given.threads,
        "sizes": {"document": DOCUMENT, "question": QUESTION, "answer": ANSWER},
        "turns": {},
    }
    for name, engine in ENGINES.items():
        log = folder / "logs" / f"conversation-{name}-{given.model}.log"
        with engine(model, given.threads, log) as server:
            for kind, talk in KINDS.items():
                found = talk(server, given.turns, SIZES[given.model].vocab, 1)
                record["turns"].setdefault(kind, {})[name] = [asdict(turn) for turn in found]
                later = statistics.median(turn.first_s for turn in found[1:])
                computed = [turn.computed for turn in found[1:]]
                print(
                    f"{kind} {name}: first turn {found[0].first_s:.2f} s, later ones "
                    f"{later:.3f} s (median), computing {min(computed)} to {max(computed)} tokens",
                    flush=True,
                )
    save(given.json, record)


if __name__ == "__main__":
    main()
