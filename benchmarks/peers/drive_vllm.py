"""vLLM for CPU, its engine in this process (in a process of its own it is slower on few cores)."""

from __future__ import annotations

import os
from itertools import count

from common import (
    KV_CACHE_BYTES,
    MAX_MODEL_LEN,
    MAX_STEP_TOKENS,
    Engine,
    Options,
    Stamps,
    Timing,
    serve,
)
from workloads import Workload


def load(options: Options) -> Engine:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_BYTES // 2**30),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    import torch
    import vllm
    from vllm.sampling_params import RequestOutputKind

    engine = vllm.LLM(
        model=str(options.directory),
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=options.max_seqs,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        enable_prefix_caching=options.prefix_cache,
        skip_tokenizer_init=True,
    ).llm_engine
    numbers = count()

    def run(work: Workload) -> Timing:
        index = {}
        stamps = Stamps(work)
        for i, request in enumerate(work.requests):
            name = str(next(numbers))
            index[name] = i
            # No per-request seed: it crashes vllm-cpu 0.32.0. Greedy needs none.
            params = vllm.SamplingParams(
                temperature=0,
                max_tokens=request.output,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                stamps.saw(index[output.request_id], len(output.outputs[0].token_ids))
        return stamps.finish()

    return Engine(
        run,
        {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    )


if __name__ == "__main__":
    serve(load)
