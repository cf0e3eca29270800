"""Seconds from starting the process to the first token of a model, files in the page cache.

    .venv/bin/python benchmarks/cold_start.py [--model bundled] [--runs 5] [--json FILE]

Two ways to a token are timed: `moebius generate` (until its output is there), and `moebius serve`
(until the first chunk of a streamed completion).
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from records import save

MOEBIUS = [sys.executable, "-m", "moebius"]


def generate(model: str) -> float:
    start = time.perf_counter()
    command = [*MOEBIUS, "generate", "--model", model, "--max-tokens", "1", "def fibonacci(n):"]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120
    )
    return time.perf_counter() - start


def serve(model: str) -> float:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    body = json.dumps(
        {"model": model, "prompt": "def fibonacci(n):", "max_tokens": 2, "stream": True}
    ).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
    )
    start = time.perf_counter()
    server = subprocess.Popen(
        [*MOEBIUS, "serve", model, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    assert response.readline().startswith(b"data: {")
                return time.perf_counter() - start
            except urllib.error.URLError:
                assert server.poll() is None and time.perf_counter() - start < 120, (
                    "the server did not start"
                )
                time.sleep(0.01)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    record: dict[str, object] = {
        "model": given.model,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for name, measure in (("generate", generate), ("serve", serve)):
        measure(given.model)
        seconds = [round(measure(given.model), 3) for _ in range(given.runs)]
        record[name] = {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
        }
        print(
            f"{name}: median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to "
            f"{max(seconds):.2f}"
        )
    save(given.json, record)


if __name__ == "__main__":
    main()
