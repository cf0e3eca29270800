"""What it costs that an engine is lost: a server's engines are killed or stopped, again and again.

    .venv/bin/python benchmarks/recovery.py [--ranks 1 2] [--hosts 1] [--kills 100]
        [--model bundled] [--seed 0] [--json FILE]

One server for all kills. Before each, clients ask for 16 answers at once, greedy and drawn, some
streamed, with log-probabilities; after a random part of a second one engine's process, chosen at
random, gets SIGKILL or, one time in four, SIGSTOP, which its channel does not tell. Every answer is
compared with what the same server gave undisturbed: text, log-probabilities, finish reason, usage.
Ends with exit code 1 where one differs.

With --hosts the ranks are spread over so many hosts, made of network namespaces (as root), and one
time in eight a host's link is cut for six seconds instead.

Seconds from the signal on: `ready` until /health/ready says so again with a new process in place of
the lost one, `ended` until the last of the 16 answers is there; medians and the worst. `cold` is
how long the server took to start, `load` the machine's load average, both for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from hosts import Together, hosts
from moebius import machine
from moebius.parallel.key import ClusterKey
from namespaces import Switched, inside, switched
from records import save

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\n",
    "class Foo:\n    def",
    "for i in range(",
    "# Sort a list of words by length, the longest first.\n" * 12,
    "try:\n    x =",
)
ANSWERS = 16
STOPPED_EVERY = 4
CUT_EVERY = 8
CUT_SECONDS = 6.0
WAIT_SECONDS = 300.0


class Server:
    """A front, its engines, and what it answers."""

    def __init__(self, pids: list[int], url: str) -> None:
        self.pids = pids
        self.url = url

    def lose_one(self, kill: int, chance: random.Random) -> tuple[str, int]:
        """How, and which engine."""
        name = "SIGSTOP" if kill % STOPPED_EVERY == STOPPED_EVERY - 1 else "SIGKILL"
        victim = chance.choice(sorted(self.engines()))
        os.kill(victim, getattr(signal, name))
        return name, victim

    def engines(self) -> set[int]:
        """The processes of its engines."""
        return {
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and _is_engine(path, self.pids)
        }

    def ready(self) -> bool:
        with suppress(urllib.error.URLError, OSError):
            return bool(urllib.request.urlopen(f"{self.url}/health/ready").status == 200)
        return False

    def answer(self, number: int) -> dict[str, Any]:
        """All that a client can compare of one request, streamed where its number is even."""
        body = {
            "prompt": f"{PROMPTS[number % len(PROMPTS)]}{number}",
            "max_tokens": 40 + 20 * (number % 5),
            "temperature": 0.0 if number % 3 else 0.9,
            "seed": number,
            "ignore_eos": True,
            "logprobs": 2,
            "stream": number % 2 == 0,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
            lines = response.read().decode().splitlines()
        # Beside data a stream has comments, by which its connection outlives silence.
        data = [line.removeprefix("data: ") for line in lines if line[:1] in ("d", "{")]
        data = [each for each in data if each != "[DONE]"]
        return _joined([json.loads(each) for each in data])


class Cluster(Server):
    """A front on one of several hosts, and engines on all of them."""

    def __init__(self, network: Switched, together: Together) -> None:
        super().__init__([each.process.pid for each in together.nodes], together.url)
        self._network = network
        self._nodes = together.nodes

    def lose_one(self, kill: int, chance: random.Random) -> tuple[str, int]:
        if kill % CUT_EVERY:
            return super().lose_one(kill, chance)
        number = chance.randrange(1, len(self._nodes))
        victim = self._nodes[number].children[0]
        self._network.cut(number)
        threading.Timer(CUT_SECONDS, self._network.mend, (number,)).start()
        return "cut", victim


def _is_engine(process: Path, parents: list[int]) -> bool:
    try:
        if b"moebius.engine.process" not in (process / "cmdline").read_bytes():
            return False
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[1]) in parents and fields[0] != "Z"


def _joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of an answer, be it one or a stream of parts."""
    found: dict[str, Any] = {"text": "", "logprobs": [], "finish": None, "usage": None}
    for event in events:
        assert "error" not in event, event
        for choice in event["choices"]:
            found["text"] += choice["text"]
            found["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
            found["finish"] = choice["finish_reason"] or found["finish"]
        usage = event.get("usage")
        if usage is not None:
            # What the cache held of a prompt is not the answer's.
            counted = ("prompt_tokens", "completion_tokens", "total_tokens")
            found["usage"] = {name: usage[name] for name in counted}
    return found


@contextmanager
def serve(model: str, ranks: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "moebius", "serve", model, "--port", "0"]
    command += ["--ranks", str(ranks), "--log-level", "error"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as front:
        assert front.stderr is not None
        while "serving on" not in (line := front.stderr.readline()):
            assert line, "the server does not start"
        with ThreadPoolExecutor(1) as reader:
            reader.submit(front.stderr.read)  # or it would wait for us one day
            try:
                yield Server([front.pid], re.findall(r"http://[^/]+", line)[0])
            finally:
                front.terminate()
                assert front.wait(60) == 0


@contextmanager
def serve_over(count: int, model: str, ranks: int) -> Iterator[Server]:
    options = ("--ranks", str(ranks), "--log-level", "error")
    with tempfile.NamedTemporaryFile("w") as key, switched(count) as network:
        key.write(ClusterKey.draw().text)
        key.flush()
        endpoint = f"{network.addresses[0]}:29500"
        with (
            hosts(network.hosts, model, endpoint, Path(key.name), *options) as together,
            inside(network.hosts[0]),
        ):
            yield Cluster(network, together)
            assert together.front.end(60) == 0


def measure(model: str, ranks: int, count: int, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """The record after each kill, of ranks on `count` hosts."""
    chance = random.Random(seed)
    began = time.monotonic()
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"ready": [], "ended": []} for name in ("SIGKILL", "SIGSTOP", "cut")
    }
    different = 0
    serving = serve(model, ranks) if count == 1 else serve_over(count, model, ranks)
    with serving as server, ThreadPoolExecutor(ANSWERS) as clients:
        wait_until(server.ready)
        cold = time.monotonic() - began
        expected = list(clients.map(server.answer, range(ANSWERS)))
        for kill in range(kills):
            asked = [clients.submit(server.answer, number) for number in range(ANSWERS)]
            time.sleep(chance.uniform(0.0, 1.0))
            killed = time.monotonic()
            name, victim = server.lose_one(kill, chance)

            def again(lost: int = victim) -> bool:
                now = server.engines()
                return lost not in now and len(now) == ranks and server.ready()

            wait_until(again)
            seconds[name]["ready"].append(time.monotonic() - killed)
            answers = [each.result() for each in asked]
            seconds[name]["ended"].append(time.monotonic() - killed)
            different += sum(map(dict.__ne__, answers, expected))
            yield {
                "ranks": ranks,
                "hosts": count,
                "kills": kill + 1,
                "cold": round(cold, 2),
                "answers": (kill + 1) * ANSWERS,
                "different": different,
                "load": round(os.getloadavg()[1], 1),
                **{name: summary(times) for name, times in seconds.items() if times["ready"]},
            }


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    return {"times": len(times["ready"])} | {
        what: {"median": round(statistics.median(each), 2), "worst": round(max(each), 2)}
        for what, each in times.items()
    }


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "an engine does not come back"
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs: dict[int, dict[str, Any]] = {}
    for ranks in args.ranks:
        for record in measure(args.model, ranks, args.hosts, args.kills, args.seed):
            runs[ranks] = record
            print(json.dumps(record), flush=True)
            result = {
                "machine": platform.machine(),
                "processors": machine.processors(),
                "model": args.model,
                "runs": list(runs.values()),
            }
            save(args.json, result)
    return 1 if any(record["different"] for record in runs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
