"""Hybrids, part of whose layers recur, through the whole engine: one answer, bit for bit, in chunks of any length,
behind snapshots of states and between them, in crowds, and after a preemption."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from covering import chosen, rest
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import prepare
from moebius.errors import MemoryPlanError
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.request.params import SamplingParams
from oracle import save_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    Answer,
    Schedule,
    Wish,
    alone,
    answers,
    build,
    each_alone,
    note,
    request_of,
    wishes,
)
from tiny import write_tokenizer

cpu = pytest.importorskip("moebius.ops.cpu")
FAMILIES = (
    "qwen3_next",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "lfm2_moe",
    "granitemoehybrid",
    "nemotron_h",
    "kimi_linear",
    "bailing_hybrid",
)
# Delta rules with one gate and with one a channel, which latents are beside; short convolutions;
# state spaces; linear attention: every run has one family of each.
KINDS = {"qwen3_next", "kimi_linear", "lfm2_moe", "granitemoehybrid", "bailing_hybrid"}
DTYPES = (torch.bfloat16, torch.float32)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
ROOMY = Schedule(8, 200, 8, 2048, True, (0,), 1)


@cache
def decoder(model_type: str, dtype: torch.dtype, threads: int = 1) -> Decoder:
    with TemporaryDirectory() as directory:
        sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
        save_tiny(Path(directory), model_type, **sizes)
        return load_decoder(Path(directory), dtype, ops=cpu.CpuOps(threads), mapped=False)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(300) for _ in range(length))


# Around blocks, the pieces that recurrences are computed in, and odd ones.
LENGTHS = frozenset((1, 3, 8, 17, 32, 33, 64))


@pytest.mark.parametrize("lengths", [LENGTHS, rest(frozenset(range(1, 65)) - LENGTHS)], ids=len)
@pytest.mark.parametrize("model_type", chosen(FAMILIES, lambda name: name in KINDS))
def test_chunks_of_any_length_have_the_same_bits(model_type: str, lengths: frozenset[int]) -> None:
    one = decoder(model_type, torch.bfloat16)
    wish = Wish("w", text(130), GREEDY, 0)
    expected = {"w": alone(one, wish)}
    for length in sorted(lengths):
        schedule = Schedule(8, 40, 1, length, length % 2 == 0, (0,), 1)
        assert answers(one, [wish], schedule).rounds == [expected], length


def ask(engine: Engine, wish: Wish) -> tuple[Answer, int]:
    """The answer, and how many tokens of the prompt were found."""
    request = request_of(wish, engine)
    engine.add(request)
    found: dict[str, Answer] = {wish.id: ([], [], [])}
    while engine.has_work:
        for output in engine.step():
            note(output, found)
    return found[wish.id], request.num_cached_tokens or 0


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        (name, dtype) if name in KINDS and DTYPES[i % 2] == dtype else rest(name, dtype)
        for i, name in enumerate(FAMILIES)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_a_prefix_is_resumed_at_a_snapshot_and_recomputed_behind_it(
    model_type: str, dtype: torch.dtype
) -> None:
    """Prompts that go on from every length of a first one: some where a snapshot is, most where
    none is, and one that goes on from the answer."""
    one = decoder(model_type, dtype)
    engine = build(one, ROOMY)
    first = Wish("first", text(100), GREEDY, 0)
    tokens = ask(engine, first)[0][0]
    hits = set()
    for length in (3, 8, 24, 31, 64, 90, 96, 99, 100, 106):
        prompt = (*first.prompt, *tokens)[:length] + text(5, seed=length)
        wish = Wish(f"w{length}", prompt, GREEDY, 0)
        found, hit = ask(engine, wish)
        assert found == alone(one, wish), length
        assert hit <= length
        hits.add(hit)
    assert 0 in hits and len(hits) > 2, "or else nothing was compared"


@pytest.mark.parametrize(
    "model_type", chosen(FAMILIES, lambda name: name in ("kimi_linear", "granitemoehybrid"))
)
def test_crowds_preemptions_and_warm_caches_change_no_bit(model_type: str) -> None:
    one = decoder(model_type, torch.bfloat16)
    rng = random.Random(model_type)
    asked = wishes(16, 300, rng, free=True)
    for i in range(8):
        params = asked[i].params.with_(max_tokens=60)
        asked[i] = replace(asked[i], prompt=asked[i].prompt[:2], params=params)
    expected = each_alone(one, asked)
    # In hardly more blocks than one sequence's, and with a slot or two for snapshots.
    tight = Schedule(4, 64 + 4, 16, 17, True, (0,) * 16, 2)
    seen = answers(decoder(model_type, torch.bfloat16, 2), asked, tight)
    assert all(found == expected for found in seen.rounds)
    assert seen.preemptions and seen.prefix_hits, "or else nothing was compared"


def test_keys_and_values_in_int8_change_what_is_computed_and_no_bit_by_its_schedule() -> None:
    one = decoder("qwen3_5_moe_text", torch.bfloat16)
    rng = random.Random(3)
    asked = wishes(10, 300, rng)
    expected = each_alone(one, asked, torch.int8)
    assert expected[asked[0].id] != alone(one, asked[0]), "nothing was quantised"
    tight = Schedule(4, 64 + 20, 10, 17, True, (0,) * 10, 2, torch.int8)
    assert all(found == expected for found in answers(one, asked, tight).rounds)


def test_a_plan_shows_states_and_refuses_where_they_do_not_fit(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_next")
    write_tokenizer(tmp_path)
    plan = prepare(tmp_path, EngineConfig(max_num_seqs=4)).plan
    rows = {what: (size, remark) for what, size, remark in plan.rows()}
    assert "slots" in rows["states"][1]
    # Of one of the two layers: 4 heads' matrices of 6 x 6, and 3 inputs of 48 columns.
    assert plan.cache.state == 4 * 6 * 6 * 4 + 3 * 48 * 4
    assert plan.bytes_per_token == 2 * 2 * 16 * 4
    with pytest.raises(MemoryPlanError, match=r"states \(1\.1 KiB a slot\) need 1\.1 KiB, but"):
        prepare(tmp_path, EngineConfig(kv_cache_memory_bytes=1000))


@pytest.mark.parametrize(
    ("model_type", "state", "of_a_token"),
    [
        # Two short convolutions' two inputs of 24 columns; of two heads' keys and values, these in
        # whole vectors.
        ("lfm2_moe", 2 * 2 * 24 * 4, 2 * (6 + 16) * 4),
        # Four heads' states of 12 x 6, and three inputs of 48 columns and two groups' B and C.
        ("granitemoehybrid", 4 * 12 * 6 * 4 + 3 * (48 + 2 * 2 * 6) * 4, 2 * (6 + 16) * 4),
        ("nemotron_h", 4 * 5 * 6 * 4 + 3 * (20 + 2 * 2 * 6) * 4, 2 * (10 + 16) * 4),
        # Four heads' states of 5 x 5, three inputs of their queries, keys and values; a latent.
        ("kimi_linear", 4 * 5 * 5 * 4 + 3 * 3 * 20 * 4, (12 + 4) * 4),
        ("bailing_hybrid", 4 * 4 * 4 * 4 + 3 * 3 * 16 * 4, (12 + 4) * 4),
    ],
)
def test_a_plan_counts_each_layers_own(
    tmp_path: Path, model_type: str, state: int, of_a_token: int
) -> None:
    save_tiny(tmp_path, model_type)
    write_tokenizer(tmp_path)
    plan = prepare(tmp_path, EngineConfig(max_num_seqs=4)).plan
    assert (plan.cache.state, plan.bytes_per_token) == (state, of_a_token)
