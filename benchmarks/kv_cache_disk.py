"""How much sooner a second start answers a long prompt that the first has kept on disk.

    .venv/bin/python benchmarks/kv_cache_disk.py --model PEERS/models/m1 [--json FILE]

Each repetition has a directory of its own and three starts, each in a process of its own, which
answers a short prompt first, so that weights are mapped, and then the long one. The first start
computes it and leaves it on disk. The second finds it there: once with its files in the system's
page cache, and once, in a third start, without, as after the machine was off. All of them give the
tokens and log-probabilities of the first, bit for bit, or this fails.

The model is one of benchmarks/peers/README.md's (m1), whose context is long enough.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import processor, save

SHORT = 128
ANSWER = 8
BYTES = 2**32


def start(model: str, directory: str, tokens: int, seed: int) -> dict[str, Any]:
    """One start, in this process: seconds to the first token of the long prompt, and the answer."""
    from moebius import LLM, SamplingParams

    rng = random.Random(seed)
    with LLM(
        model,
        kv_cache_disk=directory,
        kv_cache_disk_bytes=BYTES,
        max_model_len=tokens + ANSWER,
        max_num_seqs=4,
    ) as llm:
        vocabulary = llm.client.info.limits.vocab_size
        prompts = [[rng.randrange(vocabulary) for _ in range(n)] for n in (SHORT, tokens)]
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        llm.generate([prompts[0]], one, progress=False)
        began = time.perf_counter()
        first = llm.generate([prompts[1]], one, progress=False)[0]
        seconds = time.perf_counter() - began
        several = one.with_(max_tokens=ANSWER, logprobs=5)
        answer = llm.generate([prompts[1]], several, progress=False)[0].outputs[0]
    return {
        "seconds": seconds,
        "found": first.num_cached_tokens,
        "tokens": list(answer.token_ids),
        "logprobs": [
            [float(each.logprob).hex(), *(float(p).hex() for _, p in each.top)]
            for each in answer.logprobs or ()
        ],
    }


def in_a_process(arguments: argparse.Namespace, directory: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", arguments.model]
    command += ["--tokens", str(arguments.tokens), "--start", directory, "--seed", str(seed)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(found.splitlines()[-1])


def forget(directory: str) -> int:
    """Take the files out of the system's page cache; their bytes."""
    nbytes = 0
    for path in Path(directory).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDWR)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            nbytes += os.fstat(descriptor).st_size
            os.close(descriptor)
    return nbytes


def repetition(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        directory = str(Path(folder) / "disk")
        computed = in_a_process(arguments, directory, seed)
        cached = in_a_process(arguments, directory, seed)
        nbytes = forget(directory)
        read = in_a_process(arguments, directory, seed)
    for other in (cached, read):
        assert other["tokens"] == computed["tokens"], "another answer"
        assert other["logprobs"] == computed["logprobs"], "other bits"
    return {
        "computed_seconds": computed["seconds"],
        "page_cache_seconds": cached["seconds"],
        "disk_seconds": read["seconds"],
        "found": [each["found"] for each in (computed, cached, read)],
        "bytes": nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the directories are made; default: the system's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.model, arguments.start, arguments.tokens, arguments.seed)))
        return
    rows = []
    for seed in range(arguments.repeats):
        rows.append(repetition(arguments, seed))
        row = rows[-1]
        print(
            f"computed {row['computed_seconds']:.2f} s, from the page cache "
            f"{row['page_cache_seconds']:.2f} s, from the disk {row['disk_seconds']:.2f} s, "
            f"{row['bytes'] / 2**20:.1f} MiB, found {row['found'][2]} of {arguments.tokens}"
        )
    medians = {
        name: statistics.median(row[name] for row in rows)
        for name in ("computed_seconds", "page_cache_seconds", "disk_seconds")
    }
    sooner = {
        "page_cache": medians["computed_seconds"] / medians["page_cache_seconds"],
        "disk": medians["computed_seconds"] / medians["disk_seconds"],
    }
    print(f"{sooner['page_cache']:.1f} times sooner, {sooner['disk']:.1f} times off the disk")
    if arguments.json:
        save(
            arguments.json,
            {
                "model": Path(arguments.model).name,
                "processor": processor(),
                "tokens": arguments.tokens,
                "medians": medians,
                "times_sooner": sooner,
                "repetitions": rows,
            },
        )


if __name__ == "__main__":
    main()
