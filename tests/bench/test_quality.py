"""Bits per byte and divergence beside what transformers' logits give, worked out in one line each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moebius.bench.quality import Candidate, measure, token_rows
from moebius.cli.commands import app
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.inspect.corpus import Document
from moebius.text import Tokenizer
from tiny import TEXT, write_model

TEXTS = [Document("one", "x", TEXT[0] * 3), Document("two", "x", TEXT[1] * 2)]
CONFIG = EngineConfig(dtype="float32", kv_cache_memory_bytes=2**22)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found = []
    for seed in (0, 1):
        directory = tmp_path_factory.mktemp(f"seed{seed}")
        write_model(directory, seed=seed, initializer_range=0.1)
        found.append(directory)
    return found


def test_figures_are_those_of_transformers_logits(models: list[Path]) -> None:
    length = 24
    first, second = measure(
        [Candidate(str(at), at, CONFIG) for at in models], TEXTS, row_length=length
    )
    theirs = [AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for at in models]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(models[0] / "tokenizer.json"))
    nats = [0.0, 0.0]
    divergence = 0.0
    same = 0
    tokens = 0
    num_bytes = 0
    for document in TEXTS:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), length):
            row = torch.tensor(ids[start : start + length])
            if len(row) < 2:
                continue
            with torch.inference_mode():
                log_p, log_q = (m(row[None]).logits[0, :-1].log_softmax(-1) for m in theirs)
            nats[0] -= float(log_p.gather(1, row[1:, None]).sum())
            nats[1] -= float(log_q.gather(1, row[1:, None]).sum())
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            tokens += len(row) - 1
            # The alphabet of byte-level BPE has a character for each byte.
            num_bytes += sum(len(token) for token in tokenizer.convert_ids_to_tokens(row[1:]))
    assert (first.tokens, first.num_bytes) == (tokens, num_bytes)
    assert first.nats == pytest.approx(nats[0], rel=1e-4)
    assert second.nats == pytest.approx(nats[1], rel=1e-4)
    assert first.divergence == 0
    assert second.divergence == pytest.approx(divergence, rel=1e-3)
    assert second.same_choice == same
    record = second.record()
    assert record["bits_per_byte"] == pytest.approx(nats[1] / math.log(2) / num_bytes, rel=1e-4)
    assert record["mean_divergence"] == pytest.approx(divergence / tokens, rel=1e-3)


def test_rows_are_an_even_choice_within_documents(models: list[Path]) -> None:
    tokenizer = Tokenizer.load(models[0])
    rows = token_rows(TEXTS, tokenizer, 16, 10**6)
    ids = [tokenizer.encode(document.text) for document in TEXTS]
    assert rows == [
        each[at : at + 16] for each in ids for at in range(0, len(each), 16) if len(each) - at > 1
    ]
    fewer = token_rows(TEXTS, tokenizer, 16, 64)
    assert len(fewer) < len(rows)
    assert all(row in rows for row in fewer)
    assert fewer[0] == rows[0]


def test_the_command(models: list[Path], tmp_path: Path) -> None:
    """A line for each format; eight bits are nearly the model itself, four are not."""
    text = tmp_path / "text.txt"
    text.write_text("".join(document.text for document in TEXTS))
    out = tmp_path / "figures.json"
    asked = ["quality", str(models[0]), "--text", str(text), "--row-length", "32"]
    asked += ["--quantization", "q8_0", "--variant", "quantization=mxfp4,dtype=float32"]
    told = CliRunner().invoke(app, [*asked, "--output-json", str(out)])
    assert told.exit_code == 0, told.output
    plain, eight, four = json.loads(out.read_text())["figures"]
    assert [each["label"] for each in (plain, eight)] == [str(models[0]), "q8_0"]
    assert plain["mean_divergence"] == 0
    assert 0 < eight["mean_divergence"] < 0.01 < 100 * four["mean_divergence"]
    assert eight["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=0.01)
    assert "q8_0" in told.output and "bits per byte" in told.output


@pytest.mark.parametrize("variant", ["fast=yes", "dtype", "threads=2", "dtype=auto,dtype=float32"])
def test_variants_that_are_none(models: list[Path], tmp_path: Path, variant: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0])
    asked = ["quality", str(models[0]), "--text", str(text), "--variant", variant]
    told = CliRunner().invoke(app, asked)
    assert isinstance(told.exception, ConfigError)
    assert variant in str(told.exception)


def test_another_tokenizer_is_refused(models: list[Path], tmp_path: Path) -> None:
    from tiny import write_tokenizer

    other = tmp_path / "other"
    write_model(other)
    write_tokenizer(other, vocab_size=270)
    candidates = [Candidate("one", models[0], CONFIG), Candidate("two", other, CONFIG)]
    with pytest.raises(ConfigError, match="two: its tokenizer gives the text other tokens"):
        measure(candidates, TEXTS, row_length=16)
