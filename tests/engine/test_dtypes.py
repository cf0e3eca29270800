"""What keys and values are held in: chosen, planned, allocated, named; half the memory in int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebius.engine.config import EngineConfig
from moebius.engine.dtypes import choose_kv_dtype
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine, prepare
from moebius.errors import ConfigError
from moebius.ops.cpu.program import RecordedProgram
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from oracle import save_tiny
from tiny import write_model, write_tokenizer

PLAIN = EngineConfig(
    kv_cache_memory_bytes=2**20, max_model_len=64, max_num_seqs=3, dtype="bfloat16"
)
INT8 = replace(PLAIN, kv_cache_dtype="int8")


@pytest.mark.parametrize(
    ("wish", "computed", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("int8", torch.float32, torch.int8),
    ],
)
def test_the_default_is_what_is_computed_in(
    wish: str, computed: torch.dtype, expected: torch.dtype
) -> None:
    assert choose_kv_dtype(wish, computed) == expected


def test_another_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype .*int4.*int8"):
        EngineConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
    write_model(tmp_path)
    config = replace(PLAIN, kv_cache_dtype="float32")
    with pytest.raises(
        ConfigError, match="is float32, but bfloat16 is computed in; use auto, bfloat16 or int8"
    ):
        prepare(tmp_path, config)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2"])
def test_int8_takes_half_and_is_what_is_planned(tmp_path: Path, model_type: str) -> None:
    """Of heads of 10 values, with two bytes for a scale: 12 of 20."""
    save_tiny(tmp_path, model_type, head_dim=10)
    write_tokenizer(tmp_path)
    plain, coded = (prepare(tmp_path, config) for config in (PLAIN, INT8))
    assert (plain.plan.kv_dtype, coded.plan.kv_dtype) == ("bfloat16", "int8")
    engine = load_engine(tmp_path, INT8, prepared=coded)
    assert engine.runner.cache.nbytes == coded.plan.kv_cache == engine.info.kv_bytes > 0
    assert engine.info.kv_dtype == "int8"
    program = engine.runner.programs.step
    assert isinstance(program, RecordedProgram) and program.trace == coded.workspace.step
    # Values lie padded to 16 in either.
    by_hand = 2 * 2 * (10 + 16 + 2 + 2)
    assert coded.plan.bytes_per_token == by_hand
    assert plain.plan.bytes_per_token == 2 * 2 * 2 * (10 + 16)
    (row,) = [remark for what, _, remark in coded.rows() if what == "KV cache"]
    assert "blocks of 16 tokens in int8, 120 B a token" in row
    assert not any("int8" in remark for _, _, remark in plain.rows())
    assert coded.batch_invariant


def answer(engine: Engine, name: str) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = [i % 60 for i in range(40)]
    engine.add(
        Request(EngineRequest.create(name, prompt, params, engine.info.limits, arrival=0.0, seed=0))
    )
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
    return tokens


def test_it_is_part_of_what_blocks_are_found_by(tmp_path: Path) -> None:
    """The same prompt has other hashes, with one key."""
    write_model(tmp_path)
    engines = [load_engine(tmp_path, config, prefix_key=bytes(16)) for config in (PLAIN, INT8)]
    names = [engine.info.fingerprint for engine in engines]
    assert names[1] == names[0] + "_kv-int8"
    prompt = list(range(32))
    hashes = []
    for engine in engines:
        hasher = engine.info.hasher(bytes(16))
        assert hasher is not None
        hashes.append(set(hasher.of_prompt(prompt, b"").hashes))
    assert not hashes[0] & hashes[1]
    first = answer(engines[1], "a")
    assert answer(engines[1], "b") == first
    assert engines[1].stats().prefix_hits > 0
