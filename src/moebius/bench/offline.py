"""Latency of one batch, and throughput of many prompts, with the engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from moebius.bench.workload import Sample
from moebius.llm import LLM
from moebius.schedule.request import SamplingParams


class Timed(NamedTuple):
    """From handing over all prompts at once to the last token."""

    seconds: float
    requests: int
    prompt_tokens: int
    output_tokens: int


def timed(llm: LLM, samples: Sequence[Sample], *, n: int = 1, progress: bool | None = None) -> Timed:
    """Every answer has exactly the tokens asked for; temperature 1, so that random weights do not repeat themselves."""
    params = [
        SamplingParams(n=n, max_tokens=sample.output_tokens, temperature=1.0, ignore_eos=True, seed=i)
        for i, sample in enumerate(samples)
    ]
    start = perf_counter()
    outputs = llm.generate([sample.prompt for sample in samples], params, progress=progress)
    seconds = perf_counter() - start
    tokens = sum(o.prompt_tokens for o in outputs), sum(o.completion_tokens for o in outputs)
    return Timed(seconds, len(samples), *tokens)


def latency_figures(seconds: Sequence[float]) -> dict[str, Any]:
    """What vLLM's benchmark writes of several runs' times."""
    percentiles = {str(p): float(np.percentile(seconds, p)) for p in (10, 25, 50, 75, 90, 99)}
    return {"avg_latency": sum(seconds) / len(seconds), "latencies": seconds, "percentiles": percentiles}


def throughput_figures(run: Timed) -> dict[str, Any]:
    """What vLLM's benchmark writes of one run."""
    total = run.prompt_tokens + run.output_tokens
    return {
        "elapsed_time": run.seconds,
        "num_requests": run.requests,
        "total_prompt_tokens": run.prompt_tokens,
        "total_output_tokens": run.output_tokens,
        "total_num_tokens": total,
        "requests_per_second": run.requests / run.seconds,
        "tokens_per_second": total / run.seconds,
        "output_tokens_per_second": run.output_tokens / run.seconds,
    }
