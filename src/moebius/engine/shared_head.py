"""Logits of few rows, which ranks make together: each makes its columns of all ranks' rows.

Where a step draws few tokens, reading the head is what its logits take time for, and so each rank
reads a part of it for all, in place of the whole for itself. A logit is a product of two rows: its
bits do not depend on who computes it.

Shapes: G rows of this rank, R of all ranks, V logits each, W of them made here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moebius.models.decoder import Decoder
from moebius.moe.ranks import ExpertRank
from moebius.ops import Matrix
from moebius.ops.host import HostResult
from moebius.ops.program import Rows
from moebius.ops.sources import LOGITS, RowSource
from moebius.parallel.exchange import columns_of

SHARED_ROWS = 4
"""Of a rank, up to which ranks share the head. From some eight rows on it is computing that takes
time, of which there is as much either way."""

GATHERED = "gathered rows"


class SharedHead:
    """One rank's part of a model's head.

    rows   G at most
    """

    def __init__(self, model: Decoder, ranks: ExpertRank) -> None:
        self._model = model
        self._ranks = ranks
        self._size = ranks.received.most // ranks.tokens
        self.rows = min(SHARED_ROWS, ranks.tokens)
        self._gathered = Rows(GATHERED, self._size * self.rows)
        self._columns = columns_of(model.config.vocab_size, self._size, ranks.number)

    @classmethod
    def of(cls, model: Decoder) -> "SharedHead | None":
        """None for a model that no ranks share."""
        return None if model.ranks is None else cls(model, model.ranks)

    @property
    def source(self) -> RowSource:
        """What a program of these logits is given."""
        return RowSource(LOGITS, self.rows)

    @property
    def usable(self) -> bool:
        """Whether all ranks can make logits together now: all are there, and share memory."""
        exchange = self._ranks.exchange
        return (
            exchange.gathers
            and exchange.spec.gathered == self.rows
            and (exchange.rank, exchange.size) == (self._ranks.number, self._size)
        )

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor, rows_G: Tensor) -> Tensor:
        """(G, V), float32, of rows of hidden states. All ranks call it at once."""
        ops = self._model.ops
        x_GD = ops.embed(rows_G, hidden_TD)
        gathered = HostResult(self._gathered, x_GD.shape[1:], x_GD.dtype)
        (x_RD,) = ops.host(self._gather, [x_GD], [gathered])
        own = Matrix.of(self._model.head).rows(self._columns.start, self._columns.stop)
        parts_RW = ops.logits(x_RD, ops.prepare_linear((own, None), dtype=x_RD.dtype))
        home = HostResult(x_GD, (self._model.config.vocab_size,), torch.float32)
        (logits_GV,) = ops.host(self._scatter, [parts_RW], [home])
        return self._model.scaled(logits_GV)

    def _gather(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        return {GATHERED: self._ranks.exchange.gather(inputs[0], outputs[0])}

    def _scatter(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        self._ranks.exchange.scatter(inputs[0], outputs[0])
        return {}
