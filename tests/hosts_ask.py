"""Sends requests together, and prints what came: `python hosts_ask.py URL < bodies.json`.

A line "begun" says that all of them have tokens. Each answer is the list of its streamed pieces'
tokens and log-probabilities, put together. It imports nothing but Python's own library: it starts
on hosts whose processors are busy.
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ask(url: str, body: dict[str, Any], begun: threading.Semaphore) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    answer: dict[str, Any] = {"text": "", "tokens": [], "logprobs": [], "end": None}
    with urllib.request.urlopen(request, timeout=300) as stream:
        for line in stream:
            data = line.decode().removeprefix("data: ").strip()
            # A comment says that the server is there while no tokens come.
            if not data or data == "[DONE]" or data.startswith(":"):
                continue
            piece = json.loads(data)
            if "error" in piece:
                answer["end"] = piece["error"]
                continue
            for choice in piece["choices"]:
                answer["text"] += choice["text"]
                if choice["logprobs"] is not None:
                    answer["tokens"] += choice["logprobs"]["tokens"]
                    answer["logprobs"] += choice["logprobs"]["token_logprobs"]
                answer["end"] = choice["finish_reason"] or answer["end"]
            begun.release()
    return answer


def main() -> None:
    bodies = json.load(sys.stdin)
    begun = [threading.Semaphore(0) for _ in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        asked = [
            pool.submit(ask, sys.argv[1], body, each)
            for body, each in zip(bodies, begun, strict=True)
        ]
        for each in begun:
            each.acquire(timeout=120)
        print("begun", flush=True)
        answers = [each.result() for each in asked]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
