"""The stage `operations` of benchmarks/gpu.sh: what each kernel reaches of a card, beside its
ceiling. It leaves a record, OUT/operations.json, after every operation.

    python benchmarks/gpu_operations.py operations --out OUT [--device cuda|cpu] [--small]

Of each operation: seconds, bytes and floating-point operations a second, the floor (the larger of
its bytes over the bandwidth and of its operations over the matrix peak, both as the stage
`environment` has measured them before, in OUT), which of the two that is, and how much of it was
reached. One that fails leaves its error; where the device is lost with it, as after an access to
memory that is not there, another process goes on behind it.

Time is the device's alone, which sleeps while a round of calls is launched (gpu_timing.py);
`host_late` says where it did not sleep long enough. Between two kernels of a round there is what a
stream takes, some microseconds, of which a graph takes less. The calls of a round read copies of
weights, caches and states, which are more than the card's cache holds; so they come from memory, as
in a step. Rows are the same in all of them, as a step's lie in the cache, too.

Operations are computed as in a captured step: nothing is looked at on the host; and prompts' with
the tiles for many rows, as on a card where these hold. Their sizes are
those of Qwen3-30B-A3B, gpt-oss-20b, Qwen3.5-35B-A3B and GLM-4.7-Flash (gpu_cases.py), in the order
of their worth. --small takes small ones of these kinds, in Triton's interpreter: a rehearsal, whose
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks" / "peers")]

import torch  # noqa: E402

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
from gpu import Stage, prepared  # noqa: E402
from gpu_cases import BF16, Case, Inputs, Sequences, Work, attention_name, model_of  # noqa: E402
from gpu_figures import share  # noqa: E402
from gpu_timing import seconds_a_call, warm  # noqa: E402
from moebius.engine.devices import is_lost  # noqa: E402
from moebius.ops.draws import Draw  # noqa: E402

ROUNDS = 7
ROWS = (1, 8, 64, 256, 2048)
DECODES = (1, 8, 64, 256)
CONTEXT = 1024
"""Tokens that a sequence has when it decodes."""
LONG = 32_768
PROMPTS = (2048, 16_384)
POINTWISE_ROWS = 16_384
"""Of what has no weights: so many that no cache holds them."""
SAMPLED = 64
FORMATS = ("q8_0", "q4_k", "q6_k", "mxfp4_planes", "fp8[128x128,float32]")
FORMAT_ROWS = (1, 64, 2048)
FORMAT_SIZE = 4096
WORDS = 400
"""Letters of an error."""
GOES_ON = "MOEBIUS_GPU_STAGE_GOES_ON"
"""Tells a process that the record is one that it goes on with."""


def inputs(stage: Stage) -> Inputs:
    """What draws arguments, for kernels that look at nothing on the host."""
    if stage.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from moebius.ops.triton import TritonOps
    from moebius.ops.triton.tiles import ManyRows

    class CapturedOps(TritonOps):
        many_rows = ManyRows.WHERE_ENOUGH

        def looks(self) -> bool:
            return False

    torch.manual_seed(0)
    return Inputs(CapturedOps(), stage.device, stage.small)


def operations(stage: Stage) -> None:
    measure(stage, cases(inputs(stage)))


def measure(stage: Stage, wanted: Iterable[Case]) -> None:
    """Each in its turn, whatever becomes of those before it."""
    found: list[dict[str, Any]] = stage.record.get("operations", [])
    known = {each["operation"] for each in found}
    with torch.inference_mode():
        for case in wanted:
            if case.name in known:
                continue
            figures = measured(stage, case)
            found.append({"operation": case.name, **figures})
            stage.keep(operations=found)
            free(stage, figures)


def measured(stage: Stage, case: Case) -> dict[str, Any]:
    """Its figures, or why there are none."""
    try:
        work = case.make()
        warm(work.calls)
        found = seconds_a_call(stage.device, work.calls, 1 if stage.small else ROUNDS)
    except Exception as error:
        return failure(error)
    late = {"host_late": True} if found.host_late else {}
    return {**rates(stage, work, found.seconds), **late}


def failure(error: Exception) -> dict[str, Any]:
    """What is kept in place of figures. lost: nothing can be computed on the device any more."""
    lost = {"lost": True} if is_lost(error) else {}
    return {"failed": f"{type(error).__name__}: {error}"[:WORDS], **lost}


def free(stage: Stage, figures: Mapping[str, Any]) -> None:
    """Memory for the next; where the device is lost, a new process that goes on."""
    if "lost" in figures:
        os.environ[GOES_ON] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if stage.device == "cuda":
        torch.cuda.empty_cache()


def begun(stage: Stage) -> Stage:
    """With what a process before this one has kept, where this one goes on."""
    if os.environ.pop(GOES_ON, ""):
        stage.record |= json.loads((stage.out / f"{stage.name}.json").read_text())
    return stage


def rates(stage: Stage, work: Work, seconds: float) -> dict[str, Any]:
    """What is reached in so many seconds, and of what; without a floor where none was measured."""
    reached = {
        "seconds": seconds,
        "calls": len(work.calls),
        "bytes": work.bytes,
        "operations": work.operations,
        "bytes_per_second": work.bytes / seconds,
        "flops_per_second": work.operations / seconds,
    }
    shares = {
        bound: share(stage, reached[rate], rate)
        for bound, rate in (("bytes", "bytes_per_second"), ("operations", "flops_per_second"))
    }
    known = {bound: each for bound, each in shares.items() if each is not None}
    if not known:
        return reached
    bound = max(known, key=known.__getitem__)
    floor = known[bound] * seconds
    return {**reached, "floor_s": floor, "bound": bound, "share_of_floor": known[bound]}


def cases(at: Inputs) -> Iterator[Case]:
    """All that is measured, in the order of its worth."""
    yield from expert_cases(at, "qwen3-30b")
    yield from attention_cases(at)
    yield from linear_cases(at)
    yield from row_cases(at)
    yield from expert_cases(at, "gpt-oss-20b", "mxfp4_planes")
    yield from sink_cases(at)
    yield from format_cases(at)
    yield from recurrent_cases(at)
    yield from latent_cases(at)


def few(at: Inputs, rows: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of rows, or of sequences; of a rehearsal one and another."""
    return (1, 3)[: len(rows)] if at.small else rows


def context_of(at: Inputs) -> int:
    return 40 if at.small else CONTEXT


def expert_cases(at: Inputs, name: str, format: str = BF16) -> Iterator[Case]:
    model = model_of(name, at.small)
    part = model.feed_forward[-1]
    for rows in few(at, ROWS):
        make = partial(gpu_cases.experts, at, part, model.hidden_size, rows, format)
        yield Case(f"{name}: experts in {format}, rows {rows}", make)


def attention_cases(at: Inputs) -> Iterator[Case]:
    mixer = model_of("qwen3-30b", at.small).mixers[0]
    asked = [Sequences(count, 1, CONTEXT) for count in DECODES]
    asked.append(Sequences(1, 1, LONG))
    asked += [Sequences(1, length, length) for length in PROMPTS]
    if at.small:  # of two splits, and of one
        asked = [Sequences(1, 1, 530), Sequences(1, 40, 40)]
    for each in asked:
        make = partial(gpu_cases.attention, at, mixer, each)
        yield Case(f"qwen3-30b: {attention_name(each)}", make)


def linear_cases(at: Inputs) -> Iterator[Case]:
    model = model_of("qwen3-30b", at.small)
    mixer = model.mixers[0]
    parts = (mixer.q_rows, mixer.k_size, mixer.v_size)
    for rows in few(at, ROWS):
        make = partial(gpu_cases.linear, at, parts, model.hidden_size, rows)
        yield Case(f"qwen3-30b: queries, keys and values, rows {rows}", make)
    for rows in few(at, ROWS):
        make = partial(gpu_cases.linear, at, (model.hidden_size,), mixer.out_size, rows)
        yield Case(f"qwen3-30b: attention's output, rows {rows}", make)
    for rows in few(at, ROWS):
        yield Case(f"qwen3-30b: logits, rows {rows}", partial(gpu_cases.logits, at, model, rows))


def row_cases(at: Inputs) -> Iterator[Case]:
    """What has no weights to speak of."""
    model = model_of("qwen3-30b", at.small)
    rows = 5 if at.small else POINTWISE_ROWS
    last = model.feed_forward[-1]
    mixer = model.mixers[0]
    made = {
        "route": partial(gpu_cases.route, at, last, rows),
        "add_rms_norm": partial(gpu_cases.add_rms_norm, at, model, rows),
        "rotate_and_store": partial(gpu_cases.rotate_and_store, at, mixer, rows, model.norm_eps),
    }
    for name, make in made.items():
        yield Case(f"qwen3-30b: {name}, rows {rows}", make)
    sampled = 2 if at.small else SAMPLED
    nucleus = Draw(1.0, 0.5, width=at.ops.first_look, top_p=0.9)
    for name, draw in (("greedy", Draw(0.0, 0.0)), ("top_p", nucleus)):
        make = partial(gpu_cases.choose, at, model, sampled, draw)
        yield Case(f"qwen3-30b: choose, {name}, rows {sampled}", make)


def sink_cases(at: Inputs) -> Iterator[Case]:
    """gpt-oss-20b has layers with a window and without, all of them with sinks."""
    prompt = 40 if at.small else PROMPTS[0]
    decode = Sequences(2 if at.small else 64, 1, context_of(at))
    for mixer in model_of("gpt-oss-20b", at.small).mixers[:2]:
        window = f"a window of {mixer.window}" if mixer.window else "no window"
        for asked in (decode, Sequences(1, prompt, prompt)):
            make = partial(gpu_cases.attention, at, mixer, asked)
            yield Case(f"gpt-oss-20b: {attention_name(asked)}, sinks, {window}", make)


def format_cases(at: Inputs) -> Iterator[Case]:
    size = 256 if at.small else FORMAT_SIZE
    for format in FORMATS:
        for rows in FORMAT_ROWS[:1] if at.small else FORMAT_ROWS:
            make = partial(gpu_cases.linear, at, (size,), size, rows, format)
            yield Case(f"linear {size} -> {size} in {format}, rows {rows}", make)
    model = model_of("qwen3-30b", at.small)
    part = model.feed_forward[-1]
    rows = 1 if at.small else 64
    hidden = model.hidden_size
    if at.small:  # its blocks have 256 numbers
        part = replace(part, width=256)
        hidden = 256
    make = partial(gpu_cases.experts, at, part, hidden, rows, "q4_k")
    yield Case(f"qwen3-30b: experts in q4_k, rows {rows}", make)
    asked = Sequences(2 if at.small else 64, 1, context_of(at))
    make = partial(gpu_cases.attention, at, model.mixers[0], asked, torch.int8)
    yield Case(f"qwen3-30b: {attention_name(asked)}, an int8 cache", make)


def recurrent_cases(at: Inputs) -> Iterator[Case]:
    mixer = model_of("qwen3.5-35b", at.small).mixers[0]
    count = 2 if at.small else 64
    prompt = 5 if at.small else PROMPTS[0]
    words = {
        f"{count} sequences": Sequences(count, 1, CONTEXT),
        f"a prompt of {prompt} tokens": Sequences(1, prompt, prompt),
    }
    for what, asked in words.items():
        delta = partial(gpu_cases.gated_delta, at, mixer, asked)
        yield Case(f"qwen3.5-35b: gated delta rule, {what}", delta)
        convolution = partial(gpu_cases.causal_conv, at, mixer, asked)
        yield Case(f"qwen3.5-35b: convolution, {what}", convolution)


def latent_cases(at: Inputs) -> Iterator[Case]:
    mixer = model_of("glm-4.7-flash", at.small).mixers[0]
    prompt = 20 if at.small else PROMPTS[0]
    rows = 2 if at.small else 64
    for asked in (Sequences(rows, 1, context_of(at)), Sequences(1, prompt, prompt)):
        make = partial(gpu_cases.attention, at, mixer, asked)
        yield Case(f"glm-4.7-flash: {attention_name(asked)}, latent", make)
    for values, name in ((False, "queries"), (True, "values")):
        make = partial(gpu_cases.head_products, at, mixer, rows, values=values)
        yield Case(f"glm-4.7-flash: heads' products of {name}, rows {rows}", make)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = begun(prepared(parser, ["operations"]))
    gpu.run(stage, lambda: operations(stage))


if __name__ == "__main__":
    sys.exit(main())
