"""Our own engine, in this process: requests straight into `LLM.engine`, one step after the
other."""

from __future__ import annotations

import threading
from itertools import count
from typing import Any

from common import (
    KV_CACHE_BYTES,
    MAX_MODEL_LEN,
    MAX_STEP_TOKENS,
    Engine,
    Options,
    Peak,
    Stamps,
    Timing,
    resident,
    serve,
)
from workloads import Workload


def engine_config(max_seqs: int, threads: int, prefix_cache: bool) -> Any:
    """The engine's settings; moebius comes only now, as what it takes beyond `import torch` is
    measured."""
    from moebius.engine.config import EngineConfig

    return EngineConfig(
        dtype="bfloat16",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=prefix_cache,
        threads=threads,
    )


def load(options: Options) -> Engine:
    import torch

    baseline = sum(resident())
    from moebius import LLM, SamplingParams, __version__
    from moebius.models.store import open_checkpoint
    from moebius.request.engine_request import EngineRequest
    from moebius.schedule.request import Request

    config = engine_config(options.max_seqs, options.threads, options.prefix_cache)
    llm = LLM.from_config(str(options.directory), config)
    engine = llm.client._engine  # whose steps are made by hand here
    numbers = count()

    def run(work: Workload) -> Timing:
        # run.py stops an engine while it waits its turn, so that ours would never find the rest in
        # which it touches its KV cache; the other engines touch theirs while they load. The first
        # token after the start waits for nothing.
        for thread in threading.enumerate() if work.name != "token" else ():
            if thread.name == "populate":
                thread.join()
        index = {}
        stamps = Stamps(work)
        for i, wanted in enumerate(work.requests):
            params = SamplingParams(temperature=0, max_tokens=wanted.output, ignore_eos=True)
            name = str(next(numbers))
            index[name] = i
            asked = EngineRequest.create(
                name, wanted.prompt, params, engine.info.limits, arrival=engine.clock(), seed=0
            )
            engine.add(Request(asked))
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                stamps.saw(index[output.request_id], len(output.token_ids))
        return stamps.finish()

    def memory(peak: Peak) -> dict[str, float]:
        """What we take beyond `import torch`, the weights mapped from the file and the planned KV
        cache."""
        formats = engine.runner.ops.formats(torch.bfloat16)
        weights = open_checkpoint(options.directory).plan_weights("bfloat16", formats=formats)
        mapped = sum(weight.nbytes for weight in weights if weight.mapped) / 1e9
        cache = engine.info.kv_bytes / 1e9
        return {
            "import_torch": baseline,
            "mapped": mapped,
            "copied": sum(weight.nbytes for weight in weights if not weight.mapped) / 1e9,
            "kv_cache": cache,
            "beyond": peak.total - baseline - mapped - cache,
        }

    details = {
        "version": __version__,
        "torch": torch.__version__,
        "fingerprint": engine.info.fingerprint,
    }
    return Engine(run, {**details, "threads": options.threads}, memory, llm.close)


if __name__ == "__main__":
    serve(load)
