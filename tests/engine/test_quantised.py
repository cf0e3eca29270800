"""Quantised directories are planned as what they are, and served."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebius import LLM
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from packing import gptq
from quantised import KINDS, Kind, gptq_config, write_quantised
from tiny import write_model

CACHE = 2**20
GPTQ = Kind(gptq_config(4, 32), gptq(4, 32, stored_zero=7))


def made(directory: Path, kind: Kind) -> Path:
    write_model(directory, hidden_size=64, moe_intermediate_size=32)
    write_quantised(directory, kind)
    return directory


@pytest.mark.parametrize(
    ("kind", "isa", "words"),
    [
        (GPTQ, "reference", ["0 B copied", "repacked"]),
        (GPTQ, "", ["0 B copied", "repacked"]),
        (KINDS["mxfp4"], "reference", ["0 B copied"]),
        (KINDS["mxfp4"], "", ["0 B copied"]),
        (KINDS["fp8-block"], "", ["0 B copied"]),
    ],
)
def test_a_plan_says_what_is_repacked(
    tmp_path: Path, kind: Kind, isa: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", isa)
    made(tmp_path, kind)
    prepared = prepare(tmp_path, EngineConfig(kv_cache_memory_bytes=CACHE))
    weights = prepared.plan.weights
    (row,) = (row for row in prepared.rows() if row[0] == "weights")
    assert all(word in row[2] for word in words), row
    assert ("repacked" in row[2]) == ("repacked" in words)
    assert weights.total == sum(each.nbytes for each in prepared.weights)
    matrices = [each for each in prepared.weights if each.format != "float32"]
    stored = sum(each.count for each in matrices)
    # Four bits and a scale, or eight, where plain numbers would take 32.
    assert sum(each.nbytes for each in matrices) < stored * (1.05 if "fp8" in row[2] else 1.1)


@pytest.mark.parametrize("kind", [GPTQ, KINDS["fp8-block"]], ids=["gptq", "fp8"])
def test_a_quantised_directory_answers(tmp_path: Path, kind: Kind) -> None:
    """Greedy, twice the same; and one prompt as in a batch."""
    made(tmp_path, kind)
    prompts = ["def fibonacci", "naïve", "return n if"]
    with LLM(str(tmp_path), kv_cache_memory_bytes=CACHE, dtype="float32") as llm:
        params = llm.default_params(temperature=0, max_tokens=8)
        together = [each.outputs[0].token_ids for each in llm.generate(prompts, params)]
        alone = [llm.generate([each], params)[0].outputs[0].token_ids for each in prompts]
    assert together == alone and len(set(map(tuple, together))) == 3
