"""Latency of one batch, and throughput of many prompts, with the engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from moebius.bench.workload import Sample, require_positive
from moebius.config import require
from moebius.llm import LLM
from moebius.schedule.request import SamplingParams


def timed(llm: LLM, samples: Sequence[Sample], *, n: int = 1, progress: bool | None = None) -> tuple[float, int, int]:
    """Hand over all samples at once: (seconds to the last token, prompt tokens, answers' tokens).

    Every answer has exactly the tokens asked for; temperature 1, so that random weights do not repeat themselves.
    """
    params = [
        SamplingParams(n=n, max_tokens=sample.output_tokens, temperature=1.0, ignore_eos=True, seed=i)
        for i, sample in enumerate(samples)
    ]
    start = perf_counter()
    outputs = llm.generate([sample.prompt for sample in samples], params, progress=progress)
    seconds = perf_counter() - start
    return seconds, sum(o.prompt_tokens for o in outputs), sum(o.completion_tokens for o in outputs)


def measure_latency(
    llm: LLM, samples: Sequence[Sample], *, iterations: int, warmup: int, n: int, on_iteration: Callable[[], None]
) -> dict[str, Any]:
    """Time one batch `iterations` times after `warmup` runs that do not count."""
    require_positive(num_iters=iterations, n=n)
    require(warmup >= 0, f"--num-iters-warmup is {warmup}; it must be at least 0")
    require(
        len(samples) * n <= llm.config.max_num_seqs,
        f"{len(samples) * n} sequences are no single batch for --max-num-seqs {llm.config.max_num_seqs}; raise it",
    )
    seconds = []
    for _ in range(warmup + iterations):
        seconds.append(timed(llm, samples, n=n, progress=False)[0])
        on_iteration()
    kept = seconds[warmup:]
    percentiles = {str(p): float(np.percentile(kept, p)) for p in (10, 25, 50, 75, 90, 99)}
    return {"avg_latency": sum(kept) / len(kept), "latencies": kept, "percentiles": percentiles}


def measure_throughput(llm: LLM, samples: Sequence[Sample]) -> dict[str, Any]:
    """Requests and tokens a second; a bar is shown on a terminal."""
    elapsed, inputs, answers = timed(llm, samples)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(samples),
        "total_prompt_tokens": inputs,
        "total_output_tokens": answers,
        "total_num_tokens": inputs + answers,
        "requests_per_second": len(samples) / elapsed,
        "tokens_per_second": (inputs + answers) / elapsed,
        "output_tokens_per_second": answers / elapsed,
    }
