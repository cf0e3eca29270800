"""OpenVINO GenAI's ContinuousBatchingPipeline on the exported model (PEERS/models/NAME-ov, -ov-int8
or -ov-int4)."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from common import KV_CACHE_BYTES, MAX_STEP_TOKENS, Engine, Options, Stamps, Timing, serve
from sizes import OPENVINO
from workloads import Workload


def load(options: Options) -> Engine:
    import numpy as np
    import openvino
    import openvino_genai as genai

    schedule = genai.SchedulerConfig()
    schedule.max_num_batched_tokens = MAX_STEP_TOKENS
    schedule.max_num_seqs = options.max_seqs
    schedule.cache_size = KV_CACHE_BYTES // 2**30
    schedule.enable_prefix_caching = options.prefix_cache
    schedule.dynamic_split_fuse = True
    precision = "bf16" if _computes_bfloat16() else "f32"
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": options.threads,
    }
    exported = options.directory.with_name(OPENVINO[options.weights].format(options.model))
    pipeline = genai.ContinuousBatchingPipeline(str(exported), schedule, "CPU", properties)
    numbers = count()

    def run(work: Workload) -> Timing:
        handles = []
        stamps = Stamps(work)
        for request in work.requests:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = request.output
            config.ignore_eos = True
            config.do_sample = False
            prompt = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
            handles.append(pipeline.add_request(next(numbers), prompt, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for i, handle in enumerate(handles):
                while stamps.counts[i] < work.requests[i].output and handle.can_read():
                    stamps.saw(
                        i, sum(len(output.generated_ids) for output in handle.read().values())
                    )
        return stamps.finish()

    return Engine(
        run,
        {
            "version": genai.__version__,
            "weights": f"{exported.name}, {precision} products",
            "threads": options.threads,
        },
    )


def _computes_bfloat16() -> bool:
    """OpenVINO has bfloat16 for AVX-512 and up; with AVX2 its attention takes float32 alone."""
    return "avx512bw" in Path("/proc/cpuinfo").read_text().split()


if __name__ == "__main__":
    serve(load)
