"""Decoding a model whose file does not fit in memory (--mmap-cold), beside the same all in memory.

    sudo .venv/bin/python benchmarks/mmap_cold.py --model FILE.gguf --cache 300 500 \
        --json benchmarks/mmap_cold.json

Each way runs in a process of its own. Those with limits are in a memory group (cgroup v1 or v2)
made for it, which holds what the process takes once it is loaded and `--cache` MB of its files; the
file is dropped from the page cache before. A figure is tokens a second over 64 tokens behind a
prompt of 128, of one request, after one such request that is not counted. `read` is what came from
the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from records import processor, save

PROMPT = 128
TOKENS = 64
MB = 10**6


class Group:
    """A memory group, from its making to its end."""

    def __init__(self) -> None:
        name = f"moebius-cold-{os.getpid()}"
        first = Path("/sys/fs/cgroup/memory")
        self._v1 = first.is_dir()
        self.path = (first if self._v1 else Path("/sys/fs/cgroup")) / name
        self.path.mkdir()

    def take(self, process: int) -> None:
        (self.path / "cgroup.procs").write_text(str(process))

    def limit(self, nbytes: int) -> None:
        name = "memory.limit_in_bytes" if self._v1 else "memory.max"
        (self.path / name).write_text(str(nbytes))

    def anonymous(self) -> int:
        """Bytes that are no file's."""
        name = "rss" if self._v1 else "anon"
        lines = (self.path / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)[name])

    def remove(self) -> None:
        self.path.rmdir()


@contextmanager
def group() -> Iterator[Group]:
    made = Group()
    try:
        yield made
    finally:
        made.remove()


def drop(file: Path) -> None:
    """Let the page cache forget a file."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(model: str, *, cold: bool, threads: int, runs: int) -> None:
    """Load, say so, wait for a line, and measure."""
    from moebius import LLM, SamplingParams

    with LLM(
        model,
        mmap_cold=cold,
        threads=threads,
        max_model_len=512,
        max_num_seqs=1,
        kv_cache_memory_bytes=64 * MB,
        enable_prefix_caching=False,
    ) as llm:
        print("loaded", flush=True)
        sys.stdin.readline()
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        first = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        rates = []
        read = []
        for number in range(runs + 1):
            prompt = [300 + (number * 977 + i * 31) % 20_000 for i in range(PROMPT)]
            start = time.perf_counter()
            llm.generate([prompt], first, progress=False)
            middle = time.perf_counter()
            before = _read_bytes()
            llm.generate([prompt], params, progress=False)
            seconds = time.perf_counter() - middle - (middle - start)
            rates.append((TOKENS - 1) / seconds)
            read.append((_read_bytes() - before) / MB)
    print(json.dumps({"rates": rates[1:], "read": read[1:]}), flush=True)


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def measure(
    given: argparse.Namespace, *, cold: bool, cache: int | None, python: str = sys.executable
) -> dict[str, Any]:
    """One way; cache: MB of files that may stay in memory, None for no limit."""
    command = [python, __file__, "--child", "--model", given.model]
    command += ["--threads", str(given.threads), "--runs", str(given.runs)]
    command += ["--cold"] if cold else []
    with group() as limited:
        if cache is not None:
            drop(Path(given.model))
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: limited.take(os.getpid()),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n", "the model was not loaded"
        if cache is not None:
            limited.limit(limited.anonymous() + cache * MB)
        answer, _ = process.communicate("go\n")
        found = json.loads(answer)
    rates = found["rates"]
    return {
        "mmap_cold": cold,
        "cache_mb": cache,
        "tokens_per_second": round(statistics.median(rates), 2),
        "from": round(min(rates), 2),
        "to": round(max(rates), 2),
        "read_mb": round(statistics.median(found["read"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--cache", type=int, nargs="*", default=[300, 500], help="MB of it")
    parser.add_argument(
        "--plain", action="store_true", help="limits without --mmap-cold too, which takes minutes"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.model, cold=given.cold, threads=given.threads, runs=given.runs)
        return
    ways = [(False, None), (True, None)]
    for cache in given.cache:
        ways += [(True, cache), *([(False, cache)] if given.plain else [])]
    rows = []
    for cold, cache in ways:
        row = measure(given, cold=cold, cache=cache)
        rows.append(row)
        print(json.dumps(row), flush=True)
    record = {
        "processor": processor(),
        "model": Path(given.model).name,
        "file_mb": round(Path(given.model).stat().st_size / MB),
        "prompt": PROMPT,
        "tokens": TOKENS,
        "rows": rows,
    }
    save(given.json, record)


if __name__ == "__main__":
    main()
