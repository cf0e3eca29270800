"""A quantised model with a quantised cache has one answer on every processor, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.test_engine import make, prompts, run
from moebius import _cpu
from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine
from tiny import write_model

LEVELS = [level for level in _cpu.available() if level != "amx"]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tokens and log-probabilities of a mixed load, by instruction set and format of the cache."""
    # Widths of one block and more, and heads of more than sixteen values.
    sizes = {
        "hidden_size": 64,
        "moe_intermediate_size": 96,
        "head_dim": 24,
        "initializer_range": 0.1,
    }
    write_model(tmp_path, **sizes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def given(level: str, cache: str) -> dict[str, list[tuple[object, ...]]]:
        monkeypatch.setenv("MOEBIUS_CPU_ISA", level)
        config = EngineConfig(
            dtype="bfloat16",
            quantization="q8_0",
            kv_cache_dtype=cache,
            max_num_seqs=3,
            max_num_batched_tokens=48,
        )
        engine = load_engine(tmp_path, config)
        asked = [
            make(engine, f"r{n}", prompt, max_tokens=12, logprobs=3)
            for n, prompt in enumerate(prompts(5))
        ]
        found = {
            id: [(step.token_ids, step.logprobs) for step in steps]
            for id, steps in run(engine, asked).items()
        }
        engine.close()
        return found

    return given


@pytest.mark.skipif(len(LEVELS) < 2, reason="one instruction set has nothing to be like")
def test_answers_are_those_of_every_instruction_set(answers) -> None:
    first = answers(LEVELS[0], "int8")
    assert len(first) == 5 and all(first.values())
    for level in LEVELS[1:]:
        assert answers(level, "int8") == first, level
