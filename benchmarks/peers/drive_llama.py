"""llama.cpp's llama-server, asked over loopback HTTP (PEERS/llama-build,
PEERS/models/NAME-WEIGHTS.gguf)."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import threading
import time
from typing import Any

from common import (
    MAX_STEP_TOKENS,
    Engine,
    Options,
    Stamps,
    Timing,
    end_with_parent,
    peers_folder,
    serve,
)
from workloads import Request, Workload

# Tokens of all sequences together, in one buffer that they share: enough for every workload's
# running requests.
CONTEXT = 18_432
START_SECONDS = 300


def load(options: Options) -> Engine:
    program = peers_folder() / "llama-build" / "bin" / "llama-server"
    model = options.directory.with_name(f"{options.model}-{options.weights}.gguf")
    settings = {
        "--threads": options.threads,
        "--threads-batch": options.threads,
        "--parallel": options.max_seqs,
        "--ctx-size": CONTEXT,
        "--batch-size": MAX_STEP_TOKENS,
        "--ubatch-size": 512,
        "--flash-attn": "on",
        "--load-mode": "none",
        "--cache-ram": 0,
    }
    words = [str(word) for setting in settings.items() for word in setting]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(program), "--model", str(model), *words, "--kv-unified", "--cont-batching"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=2, preexec_fn=end_with_parent)
    try:
        _wait_until_ready(server, port)
    except BaseException:
        _stop(server)
        raise

    def run(work: Workload) -> Timing:
        stamps = Stamps(work)
        errors: list[BaseException] = []

        def one(index: int) -> None:
            try:
                _complete(port, work.requests[index], options.prefix_cache, stamps, index)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(work.requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        timing = stamps.finish()
        # Only a single request is streamed; the others' tokens are seen when they are all there.
        return timing if len(work.requests) == 1 else Timing(timing.wall, [], [])

    details = {
        "version": "vendored in llama-cpp-python 0.3.36",
        "threads": options.threads,
        "settings": settings,
    }
    return Engine(run, details, close=lambda: _stop(server))


def _complete(port: int, request: Request, prefix_cache: bool, stamps: Stamps, index: int) -> None:
    stream = len(stamps.work.requests) == 1
    body = {
        "prompt": request.prompt,
        "n_predict": request.output,
        "ignore_eos": True,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": prefix_cache,
        "stream": stream,
        "return_tokens": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request(
        "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"llama-server: {response.status} {response.read()[:500]!r}")
    if not stream:
        answer: dict[str, Any] = json.loads(response.read())
        stamps.saw(index, answer["tokens_predicted"])
        return
    for line in response:
        if line.startswith(b"data: "):
            stamps.saw(index, len(json.loads(line[6:]).get("tokens", [])))


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"llama-server ended with {server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.02)
    raise RuntimeError(f"llama-server was not ready after {START_SECONDS} s")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait(30)


if __name__ == "__main__":
    serve(load)
