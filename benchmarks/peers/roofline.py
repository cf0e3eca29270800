"""The least time a workload can take on a machine: per step, bytes over bandwidth or operations
over the matrix peak.

    python roofline.py --bandwidth 28 --matrix 2000

Steps are those of an ideal continuous batching: every running request advances by one token, whole
prompts join while the step holds at most MAX_STEP_TOKENS tokens. A step reads the weights of
attention and router, the experts that its tokens are expected to hit, and the output head, all as
their file holds them, the KV cache of its requests, in 16 bits, and their recurrent states.

Random weights make greedy decoding repeat itself, so sequences may share experts and the expected
number is an upper bound: in W3 an engine can come out above 100 %.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from common import MAX_STEP_TOKENS
from published import Published
from sizes import SIZES, Sizes, Stored
from workloads import NAMES, Workload, workload

_KV_BYTES = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one request in one step, and how long its sequence is afterwards."""

    new: int
    context: int


@dataclass(slots=True)
class Floor:
    """Seconds at least, of the whole workload and of its first step; how much is moved and computed
    in all."""

    seconds: float = 0.0
    first_seconds: float = 0.0
    steps: int = 0
    gigabytes: float = 0.0
    teraflop: float = 0.0


def floor(
    sizes: Sizes | Published,
    work: Workload,
    *,
    bandwidth: float,
    matrix: float,
    prefix_cache: bool,
    stored: Stored | None = None,
) -> Floor:
    """bandwidth in GB/s, matrix in GFLOP/s; prefix_cache: the common prefix is computed once.

    stored: what the weights take; None: bfloat16.
    """
    result = Floor()
    stored = stored or Stored.plain(sizes)
    for step in _steps(work, work.shared_prefix if prefix_cache else 0):
        moved = step_bytes(sizes, stored, step) / 1e9
        computed = step_operations(sizes, step) / 1e9
        seconds = max(moved / bandwidth, computed / matrix)
        result.first_seconds = result.first_seconds or seconds
        result.seconds += seconds
        result.steps += 1
        result.gigabytes += moved
        result.teraflop += computed / 1e3
    return result


def _steps(work: Workload, cached: int) -> Iterator[list[Chunk]]:
    """Every step's chunks; each of them ends in one token that is drawn."""
    waiting = deque(work.requests)
    running: list[tuple[int, int]] = []  # (length so far, tokens to draw)
    skip = 0
    while waiting or running:
        step = [Chunk(1, length + 1) for length, _ in running]
        running = [(length + 1, left - 1) for length, left in running if left > 1]
        budget = MAX_STEP_TOKENS - len(step)
        while (
            waiting and len(running) < work.concurrency and len(waiting[0].prompt) - skip <= budget
        ):
            request = waiting.popleft()
            new = len(request.prompt) - skip
            step.append(Chunk(new, len(request.prompt)))
            budget -= new
            skip = cached
            if request.output > 1:
                running.append((len(request.prompt), request.output - 1))
        yield step


def step_bytes(sizes: Sizes | Published, stored: Stored, step: list[Chunk]) -> float:
    tokens = sum(chunk.new for chunk in step)
    hit = sizes.experts * (1 - (1 - sizes.top_k / sizes.experts) ** tokens)
    layer = stored.attention + stored.router + hit * stored.expert
    read = sum(_KV_BYTES * sizes.cached(chunk.context) for chunk in step)
    # States are read and written.
    return sizes.layers * layer + stored.head + read + 2 * len(step) * sizes.state


def step_operations(sizes: Sizes | Published, step: list[Chunk]) -> float:
    tokens = sum(chunk.new for chunk in step)
    layer = sizes.attention + sizes.router + sizes.top_k * sizes.expert
    # A token attends to those before it: a chunk's tokens to context - new / 2 on average; scores
    # and values.
    scores = sum(chunk.new * sizes.scores(chunk.context - chunk.new / 2) for chunk in step)
    return 2 * tokens * sizes.layers * layer + 2 * len(step) * sizes.head + scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s")
    parser.add_argument("--matrix", type=float, required=True, help="GFLOP/s")
    given = parser.parse_args()
    for model, sizes in SIZES.items():
        for name in NAMES:
            work = workload(name, sizes.vocab, 1)
            result = floor(
                sizes,
                work,
                bandwidth=given.bandwidth,
                matrix=given.matrix,
                prefix_cache=name == "w3",
            )
            print(model, name, {key: round(value, 4) for key, value in asdict(result).items()})


if __name__ == "__main__":
    main()
