"""Latency of one batch, and throughput of many prompts, with the engine in this process."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from moebius.bench.workload import Sample
from moebius.llm import LLM
from moebius.request.params import SamplingParams


def timed(
    llm: LLM, samples: Sequence[Sample], *, n: int = 1, progress: bool | None = None
) -> dict[str, Any]:
    """From all prompts at once to the last token: what vLLM's benchmark writes of one run.

    Every answer has exactly the tokens asked for; temperature 1, so that random weights do not
    repeat themselves.
    """
    each = SamplingParams(n=n, temperature=1.0, ignore_eos=True)
    params = [
        each.with_(max_tokens=sample.output_tokens, seed=i) for i, sample in enumerate(samples)
    ]
    start = perf_counter()
    outputs = llm.generate([sample.prompt for sample in samples], params, progress=progress)
    seconds = perf_counter() - start
    inputs = sum(output.prompt_tokens for output in outputs)
    answers = sum(output.completion_tokens for output in outputs)
    return {
        "elapsed_time": seconds,
        "num_requests": len(samples),
        "total_prompt_tokens": inputs,
        "total_output_tokens": answers,
        "total_num_tokens": inputs + answers,
        "requests_per_second": len(samples) / seconds,
        "tokens_per_second": (inputs + answers) / seconds,
        "output_tokens_per_second": answers / seconds,
    }


def latency_figures(seconds: Sequence[float]) -> dict[str, Any]:
    """What vLLM's benchmark writes of several runs' times."""
    percentiles = {str(p): float(np.percentile(seconds, p)) for p in (10, 25, 50, 75, 90, 99)}
    return {
        "avg_latency": sum(seconds) / len(seconds),
        "latencies": seconds,
        "percentiles": percentiles,
    }
