"""llama.cpp's llama-server, asked over loopback HTTP (PEERS/llama-build,
PEERS/models/NAME-WEIGHTS.gguf)."""

from __future__ import annotations

import json
import threading
from typing import Any

from common import (
    MAX_STEP_TOKENS,
    Engine,
    Options,
    Stamps,
    Timing,
    peers_folder,
    serve,
)
from llama_server import LlamaServer
from workloads import Request, Workload

# Tokens of all sequences together, in one buffer that they share: enough for every workload's
# running requests.
CONTEXT = 18_432


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
    server = LlamaServer(program, model, settings, ["--kv-unified", "--cont-batching"])

    def run(work: Workload) -> Timing:
        stamps = Stamps(work)
        errors: list[BaseException] = []

        def one(index: int) -> None:
            try:
                _complete(server, work.requests[index], options.prefix_cache, stamps, index)
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
    return Engine(run, details, close=server.close)


def _complete(
    server: LlamaServer, request: Request, prefix_cache: bool, stamps: Stamps, index: int
) -> None:
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
    response = server.open("/completion", body)
    if not stream:
        answer: dict[str, Any] = json.loads(response.read())
        stamps.saw(index, answer["tokens_predicted"])
        return
    shown = 0
    for line in response:
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        # Tokens whose bytes are no whole character yet are in no event: the last one counts all.
        total = event["tokens_predicted"] if event["stop"] else shown + len(event["tokens"])
        stamps.saw(index, total - shown)
        shown = total


if __name__ == "__main__":
    serve(load)
