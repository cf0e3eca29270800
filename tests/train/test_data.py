from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.errors import ConfigError
from moebius.train import data as data_module
from moebius.train.data import (
    Batches,
    PreparedData,
    bytes_per_token,
    document_numbers,
    evaluation_batches,
    pack,
    prepare,
    token_dtype,
)
from moebius.train.recipe import Recipe
from stdlib.prepare import read_library

END, START = 0, 1


def test_streams_are_the_documents_with_ends_between(data: PreparedData, library: Path) -> None:
    documents = read_library(0.05, library)
    for split in ("train", "heldout"):
        stream = getattr(data, split)["library"].tolist()
        pieces: list[list[int]] = [[]]
        for token in stream:
            if token == END:
                pieces.append([])
            else:
                pieces[-1].append(token)
        assert pieces[0] == pieces[-1] == []
        texts = [data.tokenizer.decode(piece) for piece in pieces[1:-1]]
        assert texts == [d.text for d in documents if (d.split, d.kind) == (split, "library")]
        size = data.facts["sizes"][split]["library"]
        assert size["bytes"] == sum(len(text.encode()) for text in texts)
        assert size["bytes"] == int(bytes_per_token(data.tokenizer)[stream].sum())


def test_prepared_files_are_used_again_and_remade_for_other_text(
    recipe: Recipe, text: Path, tmp_path: Path
) -> None:
    prepare(recipe, tmp_path / "data")
    marked = tmp_path / "data" / "train.library.bin"
    written = marked.stat().st_mtime_ns
    prepare(recipe, tmp_path / "data")
    assert marked.stat().st_mtime_ns == written
    lines = (text / "chat.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chat.jsonl").write_text("".join(lines[:3]))
    files = {**recipe.corpus.files, "chat": (str(tmp_path / "chat.jsonl"),)}
    other = dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, files=files))
    assert prepare(other, tmp_path / "data").facts["sizes"]["train"]["chat"]["documents"] == 3
    stored = json.loads((tmp_path / "data" / "data.json").read_text())
    assert stored["facts"]["sizes"]["train"]["chat"]["documents"] == 3


def test_a_text_of_many_pieces_is_one_stream(
    recipe: Recipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_PIECE", 1000)
    again = prepare(recipe, tmp_path)
    assert again.facts == data.facts
    assert all(np.array_equal(again.train[kind], stream) for kind, stream in data.train.items())


def test_document_numbers_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 4, (20, 30), generator=generator)
    for row, numbers in zip(
        tokens.tolist(), document_numbers(tokens, END, START).tolist(), strict=True
    ):
        current, expected = 0, []
        for i, token in enumerate(row):
            chat_follows = i + 1 < len(row) and row[i + 1] == START
            chat_begins = token == START and i > 0 and row[i - 1] == END
            if (token == END and not chat_follows) or chat_begins:
                current += 1
            expected.append(current)
        assert numbers == expected
    without = document_numbers(tokens, END, None)
    assert torch.equal(without, (tokens == END).cumsum(1))


def _streams(data: PreparedData, **lengths: int) -> PreparedData:
    """Streams whose tokens tell where they are from: 1000 * kind + position."""
    made = {
        kind: (1000 * (i + 1) + np.arange(n)).astype(np.uint16)
        for i, (kind, n) in enumerate(lengths.items())
    }
    return dataclasses.replace(data, train=made)


def test_batches_are_a_function_of_the_step(data: PreparedData) -> None:
    streams = _streams(data, library=500, chat=200)
    mixture = {"library": 2, "chat": 1, "tests": 0}
    forwards = Batches(streams, mixture, rows=3, length=16, seed=1)
    steps = 2 * forwards.steps_per_epoch + 1
    expected = [forwards.batch(i).input_RL for i in range(steps)]
    backwards = Batches(streams, mixture, rows=3, length=16, seed=1)
    for i in reversed(range(steps)):
        assert torch.equal(backwards.batch(i).input_RL, expected[i])
    other = Batches(streams, mixture, rows=3, length=16, seed=2)
    assert not torch.equal(other.batch(0).input_RL, expected[0])
    assert not torch.equal(expected[0], expected[forwards.steps_per_epoch])


def test_an_epoch_passes_over_each_stream_as_the_mixture_says(data: PreparedData) -> None:
    streams = _streams(data, library=500, chat=200)
    batches = Batches(streams, {"library": 2, "chat": 1}, rows=1, length=16, seed=1)
    seen: Counter[int] = Counter()
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        assert torch.equal(batch.target_RL, batch.input_RL + 1)
        assert torch.equal(batch.input_RL[0], batch.input_RL[0, 0] + torch.arange(16))
        seen.update(batch.input_RL[0].tolist())
    assert {seen[1000 + i] for i in range(20, 480)} == {2}
    assert {seen[2000 + i] for i in range(20, 180)} == {1}


def test_batches_refuse_what_is_not_there(data: PreparedData) -> None:
    with pytest.raises(
        ConfigError, match=r"mixture\.poems names no training stream; there are library"
    ):
        Batches(data, {"poems": 1}, 1, 16, 1)
    with pytest.raises(ConfigError, match="not one batch"):
        Batches(_streams(data, library=40), {"library": 1}, 4, 16, 1)


@pytest.mark.parametrize("size", [1, 17, 48, 49, 50, 150])
def test_evaluation_takes_every_target_once(data: PreparedData, size: int) -> None:
    stream = np.arange(1, size + 1, dtype=np.uint16)
    targets: list[int] = []
    for batch in evaluation_batches(stream, data, rows=2, length=16):
        assert torch.equal(batch.target_RL, batch.input_RL + 1)
        targets += batch.target_RL.flatten().tolist()
    assert targets == stream[1:].tolist()


def test_pack_of_nothing_is_one_end(data: PreparedData) -> None:
    assert pack([], data.tokenizer, END).tolist() == [END]
    assert pack(["a"], data.tokenizer, END).tolist() == [
        END,
        data.tokenizer.encode("a").ids[0],
        END,
    ]


def test_special_tokens_spelled_out_are_text_but_in_conversations(data: PreparedData) -> None:
    text = "a<|endoftext|>b"
    packed = pack([text], data.tokenizer, END)
    assert packed.tolist().count(END) == 2 and data.tokenizer.decode(packed.tolist()) == text
    assert pack([text], data.tokenizer, END, chat=True).tolist().count(END) == 3


def test_large_vocabularies_need_four_bytes() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)
