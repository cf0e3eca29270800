"""The stage `costs` of benchmarks/gpu.sh: what promise P1, one answer in any company, costs on a
card. It leaves a record, OUT/costs.json, after every figure.

    python benchmarks/gpu_costs.py costs --out OUT [--device cuda|cpu] [--small]

    alone    operations by our kernels, and by the fastest that take another way for another number
             of rows, in turn: linear layers beside torch's product, experts beside torch's grouped
             products, attention beside scaled_dot_product_attention with each of its backends that
             takes it. Those read keys and values that lie in one piece, and not in the blocks of a
             cache, which favours them. `ours_over_fastest` is 1 where P1 costs nothing
    ours_, torch_
             tokens a second of M2 of benchmarks/peers as it is, and with its linear layers, logits
             and experts by torch's products (torch_products.py), in graphs, too, where these can be
             captured; `cost` is how much faster it is with them, 0.34 for 34 %. Nothing is proven
             of the kernels here, as torch's would not hold

What fails leaves its error. Norms, rotation and sampling pay nothing for P1: a row is computed by
itself anyway. Alone, time is the device's (gpu_operations.py). --small takes small sizes, in
Triton's interpreter, and a model of some kilobytes: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks" / "peers")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
from gpu import Stage, prepared  # noqa: E402
from gpu_cases import BF16, ExpertInputs, Inputs, Sequences, attention_name, model_of  # noqa: E402
from gpu_figures import Measured, decode, load, prefill  # noqa: E402
from gpu_operations import (  # noqa: E402
    DECODES,
    PROMPTS,
    ROUNDS,
    begun,
    context_of,
    failure,
    few,
    free,
    inputs,
)
from gpu_timing import Call, in_turn, warm  # noqa: E402
from moebius.engine.devices import is_lost  # noqa: E402
from moebius.ops.reference import ReferenceOps  # noqa: E402
from torch_products import Stacked, TorchProducts, experts_by_torch  # noqa: E402

Ways = Mapping[str, Callable[[], Sequence[Call]]]
OURS = "ours"
ROWS = (1, 16, 64, 512, 4096)
SIZE = 4096
EXPERT_ROWS = (1, 64, 256, 2048)
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
REQUESTS = (1, 32, 256)
"""Sequences that decode at once; the last ones come when all else is measured."""
PROMPT = 2048
CACHE_BYTES = 2**33
"""For the most sequences that decode; what is left of a card is for stacked experts."""


class Comparison(NamedTuple):
    """Ways to compute one thing, by whose they are; `make` takes memory, and so does each way."""

    name: str
    make: Callable[[], Ways]


def costs(stage: Stage) -> None:
    compare(stage, comparisons(inputs(stage)))
    whole_model(stage)


def compare(stage: Stage, wanted: Iterable[Comparison]) -> None:
    """Each in its turn, whatever becomes of those before it."""
    found: list[dict[str, Any]] = stage.record.get("alone", [])
    known = {each["operation"] for each in found}
    with torch.inference_mode():
        for one in wanted:
            if one.name in known:
                continue
            try:
                figures = compared(stage, one.make())
            except Exception as error:
                figures = failure(error)
            found.append({"operation": one.name, **figures})
            stage.keep(alone=found)
            free(stage, figures)


def compared(stage: Stage, ways: Ways) -> dict[str, Any]:
    """Seconds of each way, or why there are none; and ours by the fastest other."""
    found: dict[str, Any] = {}
    calls: dict[str, Sequence[Call]] = {}
    for name, make in ways.items():
        try:
            drawn = make()
            warm(drawn)
        except Exception as error:  # as of a backend that does not take this
            if is_lost(error):
                raise
            found[name] = failure(error)
            continue
        calls[name] = drawn
    times = in_turn(stage.device, calls, 1 if stage.small else ROUNDS)
    for name, one in times.items():
        late = {"host_late": True} if one.host_late else {}
        found[name] = {"seconds": one.seconds, **late}
    others = [name for name in times if name != OURS]
    if OURS in times and others:
        fastest = min(others, key=lambda name: times[name].seconds)
        found["fastest"] = fastest
        found["ours_over_fastest"] = times[OURS].seconds / times[fastest].seconds
    return found


def comparisons(at: Inputs) -> Iterator[Comparison]:
    """In the order of their worth."""
    size = 64 if at.small else SIZE
    for rows in few(at, ROWS):
        yield Comparison(f"linear {size} -> {size}, rows {rows}", partial(linear, at, size, rows))
    for rows in few(at, EXPERT_ROWS):
        yield Comparison(f"qwen3-30b: experts, rows {rows}", partial(experts, at, rows))
    yield from attention_comparisons(at)


def linear(at: Inputs, size: int, rows: int) -> Ways:
    weights = [at.weight(BF16, size, size) for _ in range(at.copies(2 * size**2))]
    x_TI = at.numbers(rows, size)

    def ours() -> Sequence[Call]:
        layers = [at.ops.prepare_linear((weight, None)) for weight in weights]
        return [partial(at.ops.linear, x_TI, each) for each in layers]

    def theirs() -> Sequence[Call]:
        return [partial(F.linear, x_TI, weight) for weight in weights]

    return {OURS: ours, "torch": theirs}


def experts(at: Inputs, rows: int) -> Ways:
    model = model_of("qwen3-30b", at.small)
    given = ExpertInputs.of(at, model.feed_forward[-1], model.hidden_size, rows)

    def theirs() -> Sequence[Call]:
        stacked = Stacked.of(given.experts)
        return [
            partial(experts_by_torch, given.x_TD, given.weights_TK, ids_TK, stacked)
            for ids_TK in given.ids
        ]

    return {OURS: partial(given.calls, at.ops), "grouped_mm": theirs}


def attention_comparisons(at: Inputs) -> Iterator[Comparison]:
    lengths = [40] if at.small else PROMPTS
    prompts = [Sequences(1, length, length) for length in lengths]
    context = context_of(at)
    counts = (2,) if at.small else DECODES
    for asked in [*prompts, *(Sequences(count, 1, context) for count in counts)]:
        yield Comparison(f"qwen3-30b: {attention_name(asked)}", partial(attention, at, asked))


def attention(at: Inputs, asked: Sequences) -> Ways:
    mixer = model_of("qwen3-30b", at.small).mixers[0]
    ways = {OURS: lambda: gpu_cases.attention(at, mixer, asked).calls}
    for backend in BACKENDS:
        name = backend.partition("_")[0].lower()
        ways[name] = partial(by_torch, at, mixer, asked, backend)
    return ways


def by_torch(at: Inputs, mixer: Any, asked: Sequences, backend: str) -> Sequence[Call]:
    """Of keys and values (B, G, S, N) in one piece, by one backend, or not at all."""
    size = mixer.head_dim
    keys = (asked.count, mixer.num_kv_heads, asked.context, size)
    q = at.numbers(asked.count, mixer.num_heads, asked.new, size)
    one = getattr(SDPBackend, backend)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(one):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=asked.new > 1, enable_gqa=True, scale=mixer.score_scale
            )

    read = 2 * 2 * asked.count * mixer.k_size * asked.context
    return [partial(attend, at.numbers(*keys), at.numbers(*keys)) for _ in range(at.copies(read))]


def whole_model(stage: Stage) -> None:
    """M2 as it is, and with torch's products; what fails of the one leaves the other's figures."""
    if stage.device == "cpu":
        os.environ["MOEBIUS_CPU_ISA"] = "reference"
    for who in (OURS, "torch"):
        if f"{who}_failed" in stage.record or f"{who}_finished" in stage.record:
            continue
        products = TorchProducts(backend(stage))
        figures: dict[str, Any] = {}
        try:
            with products.in_place() if who == "torch" else nullcontext(), unproven():
                tokens_a_second(stage, who, products)
            stage.keep(**{f"{who}_finished": True})
        except Exception as error:
            figures = failure(error)
            stage.keep(**{f"{who}_failed": figures["failed"]})
        gc.collect()  # an engine is a ring of objects, and holds the device's memory
        free(stage, figures)


def backend(stage: Stage) -> type[ReferenceOps]:
    """Whose products these are."""
    if stage.device == "cpu":
        return ReferenceOps
    from moebius.ops.triton import TritonOps

    return TritonOps


def unproven() -> AbstractContextManager[object]:
    """Within it kernels are taken as they are, and tiles for many rows with them."""
    from moebius.engine import load as loading
    from moebius.ops.triton.tiles import ManyRows, SizedOps

    def taken(decoder: Any, *_: object) -> bool:
        if isinstance(decoder.ops, SizedOps):
            decoder.ops.many_rows = ManyRows.WHERE_ENOUGH
        return False

    return mock.patch.object(loading, "prove_on_device", taken)


def tokens_a_second(stage: Stage, who: str, products: TorchProducts) -> None:
    options: dict[str, Any] = {} if stage.small else {"kv_cache_memory_bytes": CACHE_BYTES}
    longest = 512 if stage.small else PROMPT + 64
    measured = load(stage, "m2", max_model_len=longest, **options)
    products.forget()  # weights were drawn since
    with measured.llm:
        batches = (1, 2, 4) if stage.small else REQUESTS
        for requests in batches[:-1]:
            decode(measured, requests, f"{who}_")
            keep_cost(stage, f"decode_{requests}")
        prompt = 64 if stage.small else PROMPT
        prefill(measured, prompt, f"{who}_")
        keep_cost(stage, f"prefill_{prompt}")
        keep_trace(measured, who, products)
        decode(measured, batches[-1], f"{who}_")
        keep_cost(stage, f"decode_{batches[-1]}")


def keep_cost(stage: Stage, what: str) -> None:
    """How much faster torch's products are, where both were measured."""
    ours = stage.record.get(f"{OURS}_{what}")
    theirs = stage.record.get(f"torch_{what}")
    if ours is None or theirs is None:
        return
    faster = theirs["tokens_per_second"] / ours["tokens_per_second"] - 1
    stage.keep(cost=stage.record.get("cost", {}) | {what: faster})


def keep_trace(measured: Measured, who: str, products: TorchProducts) -> None:
    """Whether steps were captured, and what torch computed."""
    trace = measured.llm.client._engine.runner.programs.step.trace
    how = {"recorded": trace.recorded, "reason": trace.reason}
    measured.stage.keep(**{f"{who}_steps": {**how, "replaced": dict(products.replaced)}})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage = begun(prepared(parser, ["costs"]))
    gpu.run(stage, lambda: costs(stage))


if __name__ == "__main__":
    sys.exit(main())
