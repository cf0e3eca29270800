"""Bits per byte on held-out documents. Shape legend: R rows, L tokens in a row."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moebius.models.decoder import Decoder
from moebius.moe.losses import chosen_counts, present
from moebius.moe.router import Router
from moebius.nn.packed import PackedPast
from moebius.train.data import PreparedData, evaluation_batches
from moebius.train.ranks import Ranks
from moebius.train.sharing import Sharing

_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Score:
    """Total cross-entropy in nats over tokens that stand for `num_bytes` bytes of text.

    counts_SE   how many choices each expert got in each layer with a router; 0 for a dense model
    """

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    counts_SE: torch.Tensor | int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / max(self.num_bytes, 1) / math.log(2)

    def of_all(self, ranks: Ranks) -> "Score":
        """The sum over ranks, of which this is one's."""
        if ranks.count == 1:
            return self
        sums = torch.tensor([self.nats, self.num_tokens, self.num_bytes], dtype=torch.float64)
        sums = sums.to(ranks.device)
        counts_SE = self.counts_SE
        ranks.all_reduce(sums)
        if isinstance(counts_SE, torch.Tensor):
            counts_SE = counts_SE.to(ranks.device)
            ranks.all_reduce(counts_SE)
            counts_SE = counts_SE.cpu()
        nats, tokens, num_bytes = sums.tolist()
        return Score(nats, int(tokens), int(num_bytes), counts_SE)

    def __add__(self, other: "Score") -> "Score":
        return Score(
            nats=self.nats + other.nats,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
            counts_SE=self.counts_SE + other.counts_SE,
        )


def routers(decoder: Decoder) -> list[Router]:
    """One for each layer that has experts."""
    return list(decoder.routers.values())


@contextmanager
def measuring(decoder: Decoder, *, at_capacity: bool = False) -> Iterator[None]:
    """Without dropout and noise; dropless, as the model is served, unless `at_capacity`."""
    ops: Any = decoder.ops
    training = decoder.training
    limits = [(router, router.limits) for router in routers(decoder)]
    decoder.eval()
    ops.training = False
    if not at_capacity:
        for router, _ in limits:
            router.limits = None
    try:
        yield
    finally:
        decoder.train(training)
        ops.training = training
        for router, limit in limits:
            router.limits = limit


@torch.no_grad()
def score(
    decoder: Decoder,
    stream: np.ndarray,
    data: PreparedData,
    length: int,
    *,
    rows: int = 8,
    max_rows: int | None = None,
    sharing: Sharing | None = None,
) -> Score:
    """Score a stream's documents in rows of `length` tokens.

    A token sees what its row holds of its document.
    With `max_rows`, only that many rows are scored, spread evenly over the stream. With `sharing`,
    what this rank has of them.
    """
    device = decoder.device
    full = (len(stream) - 1) // length
    if max_rows is not None and full > max_rows:
        starts = np.linspace(0, full - 1, max_rows).astype(int) * length
        stream = np.concatenate([stream[s : s + length] for s in starts])
    total = Score()
    for whole in evaluation_batches(stream, data, rows, length):
        batch = whole if sharing is None else sharing.shard(whole)
        here = batch.to(device)
        count, width = here.input_RL.shape
        past = PackedPast(width, here.document_RL, batch.document_RL)
        positions_T = torch.arange(width, device=device).repeat(count)
        hidden_TD, routings = decoder(here.input_RL.view(-1), positions_T, past)
        target_T = here.target_RL.reshape(-1)
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(target_T), _LOGIT_ROWS):
            piece = slice(start, start + _LOGIT_ROWS)
            logits_LV = decoder.logits(hidden_TD[piece])
            nats += F.cross_entropy(logits_LV, target_T[piece], reduction="sum")
        counts = [chosen_counts(routing)[0].double() for routing in present(routings)]
        num_bytes = int(data.bytes_V[batch.target_RL].sum())
        counts_SE = torch.stack(counts).cpu() if counts else 0
        total += Score(nats.item(), target_T.numel(), num_bytes, counts_SE)
    return total


def scores(
    decoder: Decoder,
    data: PreparedData,
    length: int,
    max_rows: int | None = None,
    *,
    at_capacity: bool = False,
    sharing: Sharing | None = None,
) -> dict[str, Score]:
    """The score of each kind of held-out text, and that of `all` together.

    With `sharing`, ranks share its rows and each of them returns the whole score.
    """
    found = {}
    with measuring(decoder, at_capacity=at_capacity):
        for kind, stream in data.heldout.items():
            mine = score(decoder, stream, data, length, max_rows=max_rows, sharing=sharing)
            found[kind] = mine if sharing is None else mine.of_all(sharing.ranks)
    return found | {"all": sum(found.values(), Score())}
