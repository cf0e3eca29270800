"""Bits per byte on held-out documents. Shape legend: R rows, L tokens in a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from moebius.models.decoder import Decoder
from moebius.moe.health import expert_counts
from moebius.moe.router import Router, Routing
from moebius.train.data import PreparedData, evaluation_batches
from moebius.train.ops import DocumentAttend, TrainingOps

_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Score:
    """Total cross-entropy in nats over tokens that stand for `num_bytes` bytes of text."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / max(self.num_bytes, 1) / math.log(2)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)


def routers(decoder: Decoder) -> list[Router]:
    """One for each layer that has experts."""
    return [module for module in decoder.modules() if isinstance(module, Router)]


@contextmanager
def measuring(decoder: Decoder, *, at_capacity: bool = False) -> Iterator[None]:
    """Without dropout and noise; dropless, as the model is served, unless `at_capacity`."""
    limits, training = [(router, router.limits) for router in routers(decoder)], decoder.training
    decoder.eval()
    if isinstance(decoder.ops, TrainingOps):
        decoder.ops.training = False
    for router, _ in limits:
        router.limits = router.limits if at_capacity else None
    try:
        yield
    finally:
        decoder.train(training)
        if isinstance(decoder.ops, TrainingOps):
            decoder.ops.training = training
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
) -> Score:
    """Score a stream's documents in rows of `length` tokens: a token sees what its row holds of its document.

    With `max_rows`, only that many rows are scored, spread evenly over the stream.
    """
    device = decoder.embed_tokens.weight.device
    full = (len(stream) - 1) // length
    if max_rows is not None and full > max_rows:
        starts = np.linspace(0, full - 1, max_rows).astype(int) * length
        stream = np.concatenate([stream[s : s + length] for s in starts])
    total = Score(0.0, 0, 0)
    for batch in evaluation_batches(stream, data, rows, length):
        here = batch.to(device)
        attend = DocumentAttend(decoder.config, here.document_RL, decoder.embed_tokens.weight.dtype)
        count, width = here.input_RL.shape
        positions_T = torch.arange(width, device=device).repeat(count)
        hidden_TD, _ = decoder(here.input_RL.view(-1), positions_T, attend)
        target_T = here.target_RL.reshape(-1)
        nats = 0.0
        for hidden_LD, target_L in zip(
            torch.split(hidden_TD, _LOGIT_ROWS), torch.split(target_T, _LOGIT_ROWS), strict=True
        ):
            nats += float(F.cross_entropy(decoder.logits(hidden_LD), target_L, reduction="sum"))
        total += Score(nats, target_T.numel(), int(data.bytes_V[batch.target_RL].sum()))
    return total


@contextmanager
def counting(decoder: Decoder) -> Iterator[list[torch.Tensor]]:
    """How many choices each expert gets meanwhile, one (E,) a layer with a router."""
    found = routers(decoder)
    counts = [torch.zeros(router.config.num_experts, dtype=torch.int64) for router in found]

    def hook(router: Router, _: object, routing: Routing) -> None:
        counts[found.index(router)] += expert_counts(routing.expert_ids_TK, router.config.num_experts).cpu()

    hooks = [router.register_forward_hook(hook) for router in found]
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()


def scores(
    decoder: Decoder, data: PreparedData, length: int, max_rows: int | None = None, *, at_capacity: bool = False
) -> dict[str, Score]:
    """The score of each kind of held-out text, and that of `all` together."""
    with measuring(decoder, at_capacity=at_capacity):
        found = {kind: score(decoder, stream, data, length, max_rows=max_rows) for kind, stream in data.heldout.items()}
    return found | {"all": sum(found.values(), Score(0.0, 0, 0))}
