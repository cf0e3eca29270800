"""Bits per byte on held-out documents. Shape legend: R rows, L tokens in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from moebius.models.decoder import Decoder
from moebius.train.data import bytes_per_token, evaluation_batches
from moebius.train.ops import DocumentAttend

_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Score:
    """Total cross-entropy in nats over tokens that stand for `num_bytes` bytes of text."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.num_bytes / math.log(2)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)


@torch.no_grad()
def score(
    decoder: Decoder,
    stream: np.ndarray,
    tokenizer: Tokenizer,
    length: int,
    *,
    rows: int = 8,
    max_rows: int | None = None,
) -> Score:
    """Score a stream's documents in rows of `length` tokens: a token sees what its row holds of its document.

    With `max_rows`, only that many rows are scored, spread evenly over the stream.
    """
    bytes_V = bytes_per_token(tokenizer)
    full = (len(stream) - 1) // length
    if max_rows is not None and full > max_rows:
        starts = np.linspace(0, full - 1, max_rows).astype(int) * length
        stream = np.concatenate([stream[s : s + length] for s in starts])
    total = Score(0.0, 0, 0)
    for batch in evaluation_batches(stream, tokenizer, rows, length):
        attend = DocumentAttend(decoder.config, batch.document_RL, decoder.embed_tokens.weight.dtype)
        count, width = batch.input_RL.shape
        hidden_TD, _ = decoder(batch.input_RL.view(-1), torch.arange(width).repeat(count), attend)
        target_T = batch.target_RL.reshape(-1)
        nats = 0.0
        for hidden_LD, target_L in zip(
            torch.split(hidden_TD, _LOGIT_ROWS), torch.split(target_T, _LOGIT_ROWS), strict=True
        ):
            nats += float(F.cross_entropy(decoder.logits(hidden_LD), target_L, reduction="sum"))
        total += Score(nats, target_T.numel(), int(bytes_V[target_T].sum()))
    return total


def scores(
    decoder: Decoder, streams: Mapping[str, np.ndarray], tokenizer: Tokenizer, length: int, max_rows: int | None = None
) -> dict[str, Score]:
    """The score of each kind of text, and that of `all` together."""
    found = {kind: score(decoder, stream, tokenizer, length, max_rows=max_rows) for kind, stream in streams.items()}
    first, *rest = found.values()
    return found | {"all": sum(rest, first)}
