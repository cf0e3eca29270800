"""Rows of a step that belong to nobody, which captured graphs have: they are read nowhere, written
nowhere, and change no bit of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_kernels.conftest import DEVICE
from moebius.ops import ExpertWeights
from moebius.ops.cache_spec import CacheSpec, key_value_spec, latent_spec
from moebius.ops.config import ChannelDecay, DeltaSizes, RouterConfig, ScanSizes
from moebius.ops.steps import Rotation, StateInputs, StepInputs
from moebius.ops.triton import TritonOps

pytestmark = [pytest.mark.usefixtures("seeded", "sums_in_order")]

OPS = TritonOps()
DTYPE = torch.float32
REAL, PADDED = 3, 2
BLOCK = 4
NOBODY = torch.tensor([-1] * PADDED, device=DEVICE)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def with_padding(x: Tensor) -> Tensor:
    """x with rows behind it in which nothing is a number."""
    return torch.cat((x, x.new_full((PADDED, *x.shape[1:]), torch.nan)))


def turning(rows: int, half: int) -> Rotation:
    angles = some(rows, half)
    return Rotation(angles.cos(), angles.sin())


def padded(turn: Rotation) -> Rotation:
    return Rotation(with_padding(turn.cos_TR), with_padding(turn.sin_TR))


def cache_of(spec: CacheSpec) -> tuple[Tensor, Any]:
    """A layer's cache of four blocks, in the middle of memory that is nobody's to write."""
    size = OPS.cache_bytes_per_block(spec, BLOCK) * 4
    memory = torch.full((3 * size,), 7, dtype=torch.uint8, device=DEVICE)
    return memory, OPS.make_cache(memory[size : 2 * size], spec, BLOCK)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8], ids=str)
def test_keys_and_values_of_nobody_are_not_stored(kept: torch.dtype) -> None:
    spec = key_value_spec(2, 8, kept)
    x, turn = some(REAL, 4 * 8 + 2 * 16), turning(REAL, 4)
    slots = torch.tensor([5, 0, 9], device=DEVICE)
    (memory, held), (wanted_memory, wanted) = cache_of(spec), cache_of(spec)
    expected = OPS.rotate_and_store(x, turn, wanted, slots)
    found = OPS.rotate_and_store(with_padding(x), padded(turn), held, torch.cat((slots, NOBODY)))
    assert torch.equal(found[:REAL], expected) and torch.equal(memory, wanted_memory)


def test_latents_of_nobody_are_not_stored() -> None:
    spec = latent_spec(8, 4, DTYPE)
    q, latents, turn, norm = some(REAL, 2, 12), some(REAL, 12), turning(REAL, 2), some(8)
    slots = torch.tensor([5, 0, 9], device=DEVICE)
    (memory, held), (wanted_memory, wanted) = cache_of(spec), cache_of(spec)
    expected = OPS.rotate_and_store_latent(q.clone(), latents, turn, wanted, slots, norm, 1e-6)
    found = OPS.rotate_and_store_latent(
        with_padding(q),
        with_padding(latents),
        padded(turn),
        held,
        torch.cat((slots, NOBODY)),
        norm,
        1e-6,
    )
    assert torch.equal(found[:REAL], expected) and torch.equal(memory, wanted_memory)


@pytest.mark.parametrize("spec", [key_value_spec(1, 16, DTYPE), latent_spec(12, 4, DTYPE)], ids=str)
def test_attention_of_nobody_reads_nothing(spec: CacheSpec) -> None:
    """Whose block table is of no blocks; what it gives is zeros. Others may see no block either,
    where their window has passed."""
    _, cache = cache_of(spec)
    cache.k[:] = torch.randn(cache.k.shape)
    cache.v[:] = torch.randn(cache.v.shape)
    cache.k[2] = torch.nan
    cache.v[2] = torch.nan
    tables = [[1, 0], [-1, 3], [0]]
    starts = [6, 7, 2]
    q = some(REAL, 2, 16)
    alone = StepInputs.build([[0]] * REAL, starts, tables, BLOCK, DEVICE)
    beside = StepInputs.build(
        [[0]] * (REAL + PADDED),
        [*starts, *[-1] * PADDED],
        [*tables, *[[-1, -1]] * PADDED],
        BLOCK,
        DEVICE,
    )
    assert beside.slot_mapping[REAL:].tolist() == NOBODY.tolist()
    plan, wider = (OPS.plan_attention(step, BLOCK, window=4) for step in (alone, beside))
    expected = OPS.paged_attention(q, cache, plan, 0.3)
    found = OPS.paged_attention(with_padding(q), cache, wider, 0.3)
    assert torch.equal(found[:REAL], expected) and expected.isfinite().all()
    assert not found[REAL:].any()
    with_sinks = OPS.paged_attention(with_padding(q), cache, wider, 0.3, None, some(2))
    assert not with_sinks[REAL:].any()


SIZES = DeltaSizes(1, 2, 4, 3)


@pytest.mark.parametrize("taps", [2, 4])
def test_states_of_nobody_are_neither_read_nor_written(taps: int) -> None:
    columns = SIZES.qkv_size
    x, gates = some(REAL, columns), some(REAL, 4)
    weight, decay, bias = some(columns, taps), -torch.rand(2, device=DEVICE), some(2)
    conv, delta = some(4, taps - 1, columns), some(4, 2, 4, 3)
    conv[3] = delta[3] = torch.nan

    def run(rows: int, slots: list[int], *given: Tensor) -> list[Tensor]:
        states = StateInputs(slots, (), (), ())
        step = StepInputs.build([[0]] * rows, [5] * rows, None, 1, DEVICE, states=states)
        plan = OPS.plan_states(step)
        kept = [conv.clone(), delta.clone(), delta.clone(), delta.clone()]
        out = OPS.causal_conv(given[0], 0, weight, kept[0], plan)
        read = OPS.gated_delta(given[0], given[1], 0, decay, bias, kept[1], plan, SIZES)
        of_channels = (given[0], 0, decay, bias.repeat(4, 1).T)
        kimi = (*of_channels, kept[2], plan, SIZES, ChannelDecay())
        kimi_read = OPS.kimi_delta(given[0], given[1], 0, *kimi)
        scan = (decay, bias, bias, kept[3], plan, ScanSizes(2, 3, 4))
        scanned = OPS.selective_scan(given[0][:, :14], given[1], 0, *scan)
        return [each[:REAL] for each in (out, read, kimi_read, scanned)] + kept

    expected = run(REAL, [2, 0, 1], x, gates)
    found = run(REAL + PADDED, [2, 0, 1, -1, -1], with_padding(x), with_padding(gates))
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.equal(mine.nan_to_num(), wanted.nan_to_num())


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("nobody", [-1, 4])
def test_experts_of_nobody(nobody: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph, which nobody may wait for to look at ids."""
    monkeypatch.setattr(TritonOps, "looks", lambda _: False)
    matrices = [[some(*shape) for _ in range(4)] for shape in ((6, 8), (6, 8), (8, 6))]
    prepared = OPS.prepare_experts(ExpertWeights(*matrices), "silu", DTYPE)
    x, share = some(REAL, 8), torch.rand(REAL, 2, device=DEVICE)
    ids = torch.tensor([[0, 3], [3, 1], [2, 0]], device=DEVICE)
    none = torch.full((PADDED, 2), nobody, device=DEVICE)
    found = OPS.experts(with_padding(x), with_padding(share), torch.cat((ids, none)), prepared)
    assert torch.equal(found[:REAL], OPS.experts(x, share, ids, prepared))
    # What a router makes of rows of nobody are experts all the same: their rows join others'.
    logits = some(REAL, 4)
    weights, chosen = OPS.route(with_padding(logits), RouterConfig(4, 2))
    found = OPS.experts(with_padding(x), weights, chosen, prepared)
    expected = OPS.experts(x, *OPS.route(logits, RouterConfig(4, 2)), prepared)
    assert torch.equal(found[:REAL], expected)


def test_tokens_and_products_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonOps, "looks", lambda _: False)
    ids = torch.tensor([2, 0, 1], device=DEVICE)
    table, weight, norm = some(3, 8), some(5, 8), some(8)
    rows = OPS.embed(torch.cat((ids, NOBODY)), table)
    assert torch.equal(rows[:REAL], table[ids]) and not rows[REAL:].any()
    layers = OPS.prepare_linear((weight, None))
    x = some(REAL, 8)
    assert torch.equal(OPS.linear(with_padding(x), layers)[:REAL], OPS.linear(x, layers))
    wide, alone = with_padding(x), x
    found, expected = (OPS.add_rms_norm(each, each, 1.0, norm, 1e-6) for each in (wide, alone))
    assert all(torch.equal(mine[:REAL], its) for mine, its in zip(found, expected, strict=True))


def test_logits_of_nobody_are_not_looked_at() -> None:
    logits = some(REAL, 33)
    rows, heats, uniforms = [0, 2, 1], [1.0, 0.5, 2.0], [0.3, 0.9, 0.1]
    wide = with_padding(logits)
    assert OPS.argmax(wide, rows) == OPS.argmax(logits, rows)
    assert OPS.draw(wide, rows, heats, uniforms) == OPS.draw(logits, rows, heats, uniforms)
    found, wanted = (OPS.log_softmax_top_k(x, rows, [3, 1, 2], heats) for x in (wide, logits))
    assert all(map(torch.equal, found, wanted))
