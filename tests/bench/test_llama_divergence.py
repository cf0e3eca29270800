"""The file that llama-perplexity compares with, read by its layout, and divergence beside torch's own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from llama_divergence import Coded, Text, scored

LENGTH = 8
VOCAB = 11
CHUNKS = [[1, 2, 3, 4, 5, 6, 7, 8], [0, 10, 9, 8, 7, 6, 5, 4]]


@pytest.fixture
def rows() -> list[torch.Tensor]:
    """A distribution for each scored token; some tokens are 30 nats less likely than others."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(CHUNKS), len(scored(LENGTH)), VOCAB, dtype=torch.float64)
    logits[:, :, 2] -= 30
    return list(logits.log_softmax(-1))


def test_the_file_holds_tokens_and_coded_rows(tmp_path: Path, rows: list[torch.Tensor]) -> None:
    text = Text(CHUNKS, [Coded.of(each) for each in rows])
    text.write(tmp_path / "base")
    raw = (tmp_path / "base").read_bytes()
    assert raw[:8] == b"_logits_"
    assert struct.unpack_from("<3i", raw, 8) == (LENGTH, VOCAB, len(CHUNKS))
    at = 20
    tokens = np.frombuffer(raw, "<i4", LENGTH * len(CHUNKS), at)
    assert tokens.tolist() == [token for ids in CHUNKS for token in ids]
    at += tokens.nbytes
    # Two floats, then a code for each entry of the vocabulary, up to an even number of them.
    width = 4 + VOCAB + 1
    codes = np.frombuffer(raw, "<u2", offset=at).reshape(-1, width)
    scales = np.ascontiguousarray(codes[:, :4]).view("<f4")
    found = scales[:, :1] * codes[:, 4 : 4 + VOCAB].astype(float) + scales[:, 1:]
    wanted = torch.cat(rows).numpy()
    assert found.shape == wanted.shape
    floor = wanted.max(axis=1, keepdims=True) - 16
    assert np.abs(found - np.maximum(wanted, floor)).max() < 16 / 65535


def test_figures_are_torchs(rows: list[torch.Tensor]) -> None:
    text = Text(CHUNKS, [Coded.of(each) for each in rows])
    others = [(each + 0.3 * torch.randn_like(each)).log_softmax(-1) for each in rows]
    said = text.judge(others)
    p = torch.cat(rows)
    q = torch.cat(others)
    each = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    targets = torch.tensor([token for ids in CHUNKS for token in ids[LENGTH // 2 + 1 :]])
    nats = functional.nll_loss(q, targets)
    assert said.mean_divergence == pytest.approx(float(each.mean()), rel=1e-3)
    assert said.error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-3)
    assert said.perplexity == pytest.approx(float(nats.exp()))
    assert said.same_choice == float((p.argmax(-1) == q.argmax(-1)).double().mean())
