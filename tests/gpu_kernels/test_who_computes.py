"""Who `capability` names is who computes, in every operation and dtype; and either is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_kernels.conftest import DEVICE, counted
from moebius.ops import ExpertWeights, Operation, Ops, Use
from moebius.ops.cache_spec import key_value_spec, latent_spec
from moebius.ops.capability import Feature
from moebius.ops.config import ChannelDecay, DeltaSizes, HeadGates, RouterConfig, ScanSizes
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation, StateInputs, StepInputs
from moebius.ops.triton import OF_FLOAT32, TritonOps

pytestmark = pytest.mark.usefixtures("seeded")

OPS = TritonOps()
REF = ReferenceOps()
ROWS = 3
BLOCK = 4
# The distance between 1 and the next number.
EPS = {
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
    torch.float32: 2.0**-18,
    torch.float64: 2.0**-18,
}


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def turning(half: int) -> Rotation:
    angles = torch.randn(ROWS, half, device=DEVICE)
    return Rotation(angles.cos(), angles.sin())


def step() -> StepInputs:
    """Of two sequences, one of which brings two rows and one a decode of its last."""
    states = StateInputs([1, 0], (), (), ())
    return StepInputs.build([[0, 0], [0]], [0, 0], [[0], [1]], BLOCK, DEVICE, states=states)


def linear(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    layers = ops.prepare_linear((some(dtype, 5, 8), some(dtype, 5)), dtype=dtype)
    return [ops.linear(some(dtype, ROWS, 8), layers)]


def logits(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    layers = ops.prepare_linear((some(dtype, 5, 8), None), dtype=dtype)
    return [ops.logits(some(dtype, ROWS, 8), layers)]


def stored(
    ops: Ops, dtype: torch.dtype, kept: torch.dtype | None = None
) -> tuple[Tensor, Any, StepInputs]:
    """Queries, and the cache in which their keys and values are."""
    made = step()
    spec = key_value_spec(1, 8, kept or dtype)
    size = ops.cache_bytes_per_block(spec, BLOCK) * 2
    memory = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    cache: Any = ops.make_cache(memory, spec, BLOCK)
    x = some(dtype, ROWS, 32)
    q_THN = ops.rotate_and_store(x, turning(4), cache, made.slot_mapping)
    return q_THN, cache, made


def rotate_and_store(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    q_THN, cache, _ = stored(ops, dtype)
    return [q_THN, cache.k, cache.v]


def paged_attention(ops: Ops, dtype: torch.dtype, kept: torch.dtype | None = None) -> list[Tensor]:
    q_THN, cache, made = stored(ops, dtype, kept)
    return [ops.paged_attention(q_THN, cache, ops.plan_attention(made, BLOCK), 0.3)]


def attention_to_codes(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    return paged_attention(ops, dtype, torch.int8)


def chosen() -> tuple[Tensor, Tensor]:
    return torch.rand(ROWS, 2, device=DEVICE), torch.tensor([[0, 2], [1, 0], [2, 1]], device=DEVICE)


def of_experts(ops: Ops, dtype: torch.dtype) -> Any:
    matrices = [[some(dtype, *shape) for _ in range(3)] for shape in ((6, 8), (6, 8), (8, 6))]
    return ops.prepare_experts(ExpertWeights(*matrices), "silu", dtype)


def experts(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    prepared = of_experts(ops, dtype)
    return [ops.experts(some(dtype, ROWS, 8), *chosen(), prepared)]


def expert_rows(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    prepared = of_experts(ops, dtype)
    return [ops.expert_rows(some(dtype, ROWS, 8), chosen()[1], prepared)]


def route(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    return list(ops.route(some(dtype, ROWS, 6), RouterConfig(6, 2)))


def within_capacity(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    share, ids = chosen()
    return [ops.within_capacity(share.to(dtype), ids, 3, 1, ops.plan_states(step()))]


DELTA = DeltaSizes(1, 2, 4, 3)
SCAN = ScanSizes(2, 3, 4)


def state(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, *shape, device=DEVICE).to(dtype)


def causal_conv(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    kept = state(2, 5, dtype=dtype)
    plan = ops.plan_states(step())
    return [ops.causal_conv(some(dtype, ROWS, 5), 0, some(dtype, 5, 3), kept, plan), kept]


def gated_delta(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    kept = state(2, 4, 3)
    x, gates = some(dtype, ROWS, DELTA.qkv_size), some(dtype, ROWS, 4)
    rates = -torch.rand(2, device=DEVICE), torch.rand(2, device=DEVICE)
    plan = ops.plan_states(step())
    return [ops.gated_delta(x, gates, 0, *rates, kept, plan, DELTA), kept]


def kimi_delta(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    kept = state(2, 4, 3)
    x, beta, channels = (some(dtype, ROWS, size) for size in (DELTA.qkv_size, 2, 8))
    rates = -torch.rand(2, device=DEVICE), torch.rand(2, 4, device=DEVICE)
    plan = ops.plan_states(step())
    given = (x, beta, 0, channels, 0, *rates, kept, plan, DELTA, ChannelDecay())
    return [ops.kimi_delta(*given), kept]


def selective_scan(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    kept = state(2, 4, 3)
    rates = -torch.rand(2, device=DEVICE), torch.rand(2, device=DEVICE), state()
    x, steps = some(dtype, ROWS, SCAN.xbc_size), some(dtype, ROWS, 2)
    plan = ops.plan_states(step())
    return [ops.selective_scan(x, steps, 0, *rates, kept, plan, SCAN), kept]


def head_products(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    heads = ops.prepare_heads(some(dtype, 2 * 5, 8), 2, dtype)
    return [ops.head_products(some(dtype, ROWS, 2, 11), heads)]


def rotate_and_store_latent(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    spec = latent_spec(8, 4, dtype)
    size = ops.cache_bytes_per_block(spec, BLOCK) * 2
    cache: Any = ops.make_cache(torch.zeros(size, dtype=torch.uint8, device=DEVICE), spec, BLOCK)
    q, latents, norm = some(dtype, ROWS, 2, 12), some(dtype, ROWS, 12), some(dtype, 8)
    slots = step().slot_mapping
    found = ops.rotate_and_store_latent(q, latents, turning(2), cache, slots, norm, 1e-6)
    return [found, cache.k]


def sampling(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(ops.argmax(some(dtype, ROWS, 7)))]


CALLS: dict[Operation, Callable[[Ops, torch.dtype], Sequence[Tensor]]] = {
    Operation.EMBED: lambda ops, dtype: [
        ops.embed(torch.tensor([2, 0, 2], device=DEVICE), some(dtype, 4, 8), 1.5)
    ],
    Operation.LINEAR: linear,
    Operation.LOGITS: logits,
    Operation.RMS_NORM: lambda ops, dtype: [
        ops.rms_norm(some(dtype, ROWS, 8), some(dtype, 8), 1e-6)
    ],
    Operation.ADD_RMS_NORM: lambda ops, dtype: ops.add_rms_norm(
        some(dtype, ROWS, 8), some(dtype, ROWS, 8), 0.5, some(dtype, 8), 1e-6
    ),
    Operation.RMS_NORM_PART: lambda ops, dtype: [
        ops.rms_norm_part(some(dtype, ROWS, 8), 2, some(dtype, 4), 1e-6)
    ],
    Operation.CLIP: lambda ops, dtype: [ops.clip(some(dtype, ROWS, 8), 0.5)],
    Operation.SOFTCAP: lambda ops, dtype: [ops.softcap(some(dtype, ROWS, 8), 3.0)],
    Operation.DIVIDE: lambda ops, dtype: [ops.divide(some(dtype, ROWS, 8), 3.0)],
    Operation.ROTATION: lambda ops, dtype: ops.rotation(
        torch.tensor([0, 1, 5], device=DEVICE), some(dtype, 4).abs(), 1.0
    ),
    Operation.ROTARY: lambda ops, dtype: [ops.rotary(some(dtype, ROWS, 2, 8), turning(4))],
    Operation.ADD_GATED: lambda ops, dtype: [
        ops.add_gated(some(dtype, ROWS, 8), some(dtype, ROWS, 8), some(torch.float32, ROWS, 1))
    ],
    Operation.ROTATE_AND_STORE: rotate_and_store,
    Operation.PAGED_ATTENTION: paged_attention,
    Operation.ROUTE: route,
    Operation.EXPERTS: experts,
    Operation.EXPERT_ROWS: expert_rows,
    Operation.COMBINE: lambda ops, dtype: [ops.combine(some(dtype, ROWS, 2, 8), chosen()[0])],
    Operation.WITHIN_CAPACITY: within_capacity,
    Operation.CAUSAL_CONV: causal_conv,
    Operation.GATED_DELTA: gated_delta,
    Operation.KIMI_DELTA: kimi_delta,
    Operation.SELECTIVE_SCAN: selective_scan,
    Operation.GATED_NORM: lambda ops, dtype: [
        ops.gated_norm(some(dtype, ROWS, 8), some(dtype, ROWS, 8), 0, some(dtype, 4), 1e-6)
    ],
    Operation.GROUPED_NORM: lambda ops, dtype: [
        ops.grouped_norm(some(dtype, ROWS, 8), some(dtype, ROWS, 8), 0, some(dtype, 8), 1e-6, 2)
    ],
    Operation.GATE_HEADS: lambda ops, dtype: [
        ops.gate_heads(some(dtype, ROWS, 2, 4), some(dtype, ROWS, 8), HeadGates(0, 4))
    ],
    Operation.HEAD_PRODUCTS: head_products,
    Operation.ROTATE_AND_STORE_LATENT: rotate_and_store_latent,
    Operation.SAMPLING: sampling,
}
# All that is asked for in one dtype.
USES = [
    (operation, dtype)
    for operation in Operation
    for dtype in EPS
    if dtype == torch.float32 or operation != Operation.SAMPLING
]


def near(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


def test_every_operation_is_called() -> None:
    assert set(CALLS) == set(Operation)


@pytest.mark.parametrize(("operation", "dtype"), USES, ids=str)
def test_who_is_named_computes(operation: Operation, dtype: torch.dtype) -> None:
    call = CALLS[operation]
    torch.manual_seed(0)
    with counted() as launched:
        found = call(OPS, dtype)
    told = OPS.capability(Use(operation, dtype))
    assert told is not None and told.by == ("triton" if launched else "reference")
    torch.manual_seed(0)
    near(found, call(REF, dtype), dtype)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_who_is_named_attends_to_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with counted() as launched:
        found = attention_to_codes(OPS, dtype)
    use = Use(Operation.PAGED_ATTENTION, dtype, frozenset({Feature.INT8_CACHE}))
    told = OPS.capability(use)
    assert told is not None and (told.by == "triton") == ("attend_in_order" in launched)
    torch.manual_seed(0)
    # Weights of values in codes are bfloat16 in float16 too, as they may be small.
    near(found, attention_to_codes(REF, dtype), max(dtype, torch.bfloat16, key=EPS.get))


def test_models_of_narrow_numbers_are_ours() -> None:
    for operation in set(Operation) - OF_FLOAT32:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            told = OPS.capability(Use(operation, dtype))
            assert told is not None and told.by == "triton", operation
    for operation in OF_FLOAT32:
        told = OPS.capability(Use(operation, torch.float32))
        assert told is not None and told.by == "triton", operation
