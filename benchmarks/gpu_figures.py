"""One stage of benchmarks/gpu.sh that measures a model of published sizes on a card, and leaves a
record, OUT/STAGE.json, after every figure.

    python benchmarks/gpu_figures.py STAGE --out OUT [--device cuda|cpu] [--small]

    figures-m2, figures-qwen3-30b, figures-gpt-oss-20b
              tokens a second of 1, 8, 64 and 256 sequences, and the share of the bytes' roofline;
              prompts of 2,048 and 16,384 tokens, and the share of the matrix peak; 256 requests of
              1,000 tokens in and out; where a step's time goes, kernel by kernel
    host-qwen3-30b
              tokens a second of 1 and 8 sequences with all experts in the host's memory, and with
              as many on the card as leave room (--experts)
    peers-m2  32 requests of 128 tokens in and out: here, by transformers' continuous batching, and
              by its generate() on one batch

Weights are random and drawn on the card (gpu_models.py). The peaks are those that the stage
`environment` has measured before, in OUT. --small takes models of some kilobytes and few tokens: a
rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks" / "peers")]

from roofline import Chunk, step_bytes, step_operations  # noqa: E402

import gpu  # noqa: E402
from gpu import FIRST_ID, Stage, prepared, seconds  # noqa: E402
from gpu_models import CardModel, card_model, draw_holes, write_hollow  # noqa: E402


class Load(NamedTuple):
    """Requests at once, and tokens of each, in and out."""

    requests: int
    prompt: int
    output: int

    @property
    def made(self) -> int:
        return self.requests * self.output


BATCHES = (1, 8, 64, 256)
PROMPTS = (2048, 16_384)
CLOSED_LOOP = Load(256, 1000, 1000)
PEERS = Load(32, 128, 128)
DECODED = 64
"""Tokens of a sequence whose times are taken."""
CONTEXT = 512
"""Tokens before them."""
TURNS = 3


@dataclass(slots=True)
class Measured:
    """A model on the device, and what may be asked of it."""

    stage: Stage
    model: CardModel
    llm: Any
    seed: int = 0

    @property
    def most(self) -> int:
        return 4 if self.stage.small else max(BATCHES)

    def generate(self, requests: int, prompt: int, output: int) -> float:
        """Seconds for so many new requests at once, of so many tokens in and out, exactly."""
        from moebius import SamplingParams

        self.seed += 1
        ids = random.Random(self.seed)
        vocab = self.model.sizes.vocab
        prompts = [[ids.randrange(FIRST_ID, vocab) for _ in range(prompt)] for _ in range(requests)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)

        def work() -> None:
            results = self.llm.generate(prompts, params, progress=False)
            made = [len(result.outputs[0].token_ids) for result in results]
            assert made == [output] * requests, made

        return seconds(work, self.stage.device)


def load(stage: Stage, name: str, **options: Any) -> Measured:
    """A model of drawn weights, as the engine would have one from files."""
    from moebius import LLM, __version__

    model = card_model(name, stage.small)
    folder = Path(tempfile.gettempdir()) / "moebius-gpu" / f"hollow-{name}-{stage.small}"
    nbytes = write_hollow(model, folder)
    usual = {
        "max_model_len": 512 if stage.small else max(PROMPTS) + 64,
        "max_num_seqs": 8 if stage.small else max(BATCHES),
        "enable_prefix_caching": False,
        **({"kv_cache_memory_bytes": 2**24} if stage.small else {}),
    }
    start = time.perf_counter()
    llm = LLM(str(folder), device=stage.device, dtype="bfloat16", **(usual | options))
    wall = time.perf_counter() - start
    runner = llm.client._engine.runner  # nothing that serves reaches into its weights
    drawn = 0 if stage.device == "cpu" else draw_holes(runner.model)  # whose pages are a file's
    stage.keep(
        moebius=__version__,
        model=name,
        parameters=model.sizes.parameters,
        checkpoint_bytes=nbytes,
        load_s=wall,
        drawn=drawn,
        ops=runner.ops.name,
        fingerprint=llm.client.info.fingerprint,
    )
    return Measured(stage, model, llm)


def figures(stage: Stage, name: str) -> None:
    measured = load(stage, name)
    with measured.llm:
        for requests in BATCHES:
            decode(measured, min(requests, measured.most))
        for prompt in PROMPTS:
            prefill(measured, 64 if stage.small else prompt)
        where_time_goes(measured)
        closed_loop(measured)


def beside_host(stage: Stage, name: str) -> None:
    """What experts in the host's memory cost. A file's holes are zeros there, whose products take
    as long on a CPU."""
    for experts in ("cpu", "auto"):
        with load(stage, name, experts=experts, max_num_seqs=8).llm as llm:
            measured = Measured(stage, card_model(name, stage.small), llm)
            for requests in (1, 8):
                decode(measured, requests, f"{experts}_")


def decode(measured: Measured, requests: int, prefix: str = "") -> None:
    """Time per step: what `output` tokens take beyond what one takes, of as many prompts."""
    context = 16 if measured.stage.small else CONTEXT
    output = 4 if measured.stage.small else DECODED
    measured.generate(requests, context, 2)  # what is compiled or recorded, is by then
    steps: list[float] = []
    for _ in range(1 if measured.stage.small else TURNS):
        first = measured.generate(requests, context, 1)
        whole = measured.generate(requests, context, output)
        steps.append((whole - first) / (output - 1))
    step = statistics.median(steps)
    model = measured.model
    floor = step_bytes(model.sizes, model.stored, [Chunk(1, context + output // 2)] * requests)
    measured.stage.keep(
        **{
            f"{prefix}decode_{requests}": {
                "step_s": steps,
                "tokens_per_second": requests / step,
                "bytes_per_step": floor,
                "share_of_bandwidth": share(measured.stage, floor / step, "bytes_per_second"),
            }
        }
    )


def prefill(measured: Measured, prompt: int) -> None:
    walls = [measured.generate(1, prompt, 1) for _ in range(1 + TURNS)][1:]
    wall = statistics.median(walls)
    operations = step_operations(measured.model.sizes, [Chunk(prompt, prompt)])
    measured.stage.keep(
        **{
            f"prefill_{prompt}": {
                "seconds": walls,
                "tokens_per_second": prompt / wall,
                "operations": operations,
                "share_of_matrix_peak": share(
                    measured.stage, operations / wall, "flops_per_second"
                ),
            }
        }
    )


def closed_loop(measured: Measured) -> None:
    load = Load(4, 16, 8) if measured.stage.small else CLOSED_LOOP
    wall = measured.generate(*load)
    rate = {"seconds": wall, "output_tokens_per_second": load.made / wall}
    measured.stage.keep(closed_loop=load._asdict() | rate)


def where_time_goes(measured: Measured) -> None:
    """Of 8 sequences' steps: the device's kernels by their time, and what is left of a step."""
    import torch

    if measured.stage.device == "cpu":
        return
    from torch.profiler import ProfilerActivity, profile

    requests = 8
    output = 32
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        wall = measured.generate(requests, CONTEXT, output)
        torch.cuda.synchronize()
    kernels = sorted(
        (
            (event.key, event.count, event.self_device_time_total / 1e6)
            for event in profiled.key_averages()
            if event.self_device_time_total
        ),
        key=lambda each: -each[2],
    )
    busy = sum(each[2] for each in kernels)
    measured.stage.keep(
        where_time_goes={
            "sequences": requests,
            "steps": output,
            "wall_s": wall,
            "device_busy_s": busy,
            "host_s_per_step": (wall - busy) / output,
            "kernels": [
                {"name": name[:100], "calls": calls, "seconds": spent}
                for name, calls, spent in kernels[:20]
            ],
        }
    )


def share(stage: Stage, reached: float, peak: str) -> float | None:
    """Of what the stage `environment` has seen this machine reach; None where it has not run."""
    file = stage.out / "environment.json"
    if not file.exists():
        return None
    found: float = reached / json.loads(file.read_text())[peak]
    return found


def peers(stage: Stage, name: str) -> None:
    asked = Load(2, 16, 8) if stage.small else PEERS
    measured = load(stage, name)
    with measured.llm:
        measured.generate(asked.requests, asked.prompt, 2)
        walls = [measured.generate(*asked) for _ in range(TURNS)]
    stage.keep(**asked._asdict())
    keep_rate(stage, "ours", walls, asked.made)
    transformers_peers(stage, measured.model, asked)


def keep_rate(stage: Stage, who: str, walls: list[float], tokens: int) -> None:
    rate = tokens / statistics.median(walls)
    stage.keep(**{who: {"seconds": walls, "output_tokens_per_second": rate}})


def transformers_peers(stage: Stage, model: CardModel, asked: Load) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if stage.device == "cuda":
        torch.cuda.empty_cache()
    config = AutoConfig.for_model(**model.config_json)
    with torch.device(stage.device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = random.Random(1)
    prompts = [
        [ids.randrange(FIRST_ID, model.sizes.vocab) for _ in range(asked.prompt)]
        for _ in range(asked.requests)
    ]
    exact = {
        "max_new_tokens": asked.output,
        "do_sample": False,
        "eos_token_id": -1,
        "pad_token_id": 0,
    }
    batch = torch.tensor(prompts, device=stage.device)

    def whole_batch() -> int:
        found = theirs.generate(batch, min_new_tokens=asked.output, **exact)
        return int(found.shape[1] - asked.prompt) * asked.requests

    def continuous() -> int:
        found = theirs.generate_batch(
            inputs=prompts, generation_config=GenerationConfig(**exact), progress_bar=False
        )
        return sum(len(each.generated_tokens) for each in found.values())

    for who, work in (("transformers_generate", whole_batch), ("transformers_batched", continuous)):
        timed_peer(stage, who, work, asked.made)


def timed_peer(stage: Stage, who: str, work: Callable[[], int], tokens: int) -> None:
    """Its rate, or why it has none: a peer that fails ends nothing."""
    try:
        walls: list[float] = []
        for _ in range(2):  # the first is the warm-up
            start = time.perf_counter()
            made = work()
            walls.append(time.perf_counter() - start)
            assert made == tokens, f"{made} tokens instead of {tokens}"
    except Exception as error:
        stage.keep(**{who: {"failed": f"{type(error).__name__}: {error}"[:400]}})
        return
    keep_rate(stage, who, walls[1:], tokens)


STAGES: dict[str, tuple[Callable[[Stage, str], None], str]] = {
    "figures-m2": (figures, "m2"),
    "figures-qwen3-30b": (figures, "qwen3-30b"),
    "figures-gpt-oss-20b": (figures, "gpt-oss-20b"),
    "host-qwen3-30b": (beside_host, "qwen3-30b"),
    "peers-m2": (peers, "m2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = prepared(parser, STAGES)
    work, model = STAGES[stage.name]
    gpu.run(stage, lambda: work(stage, model))


if __name__ == "__main__":
    sys.exit(main())
