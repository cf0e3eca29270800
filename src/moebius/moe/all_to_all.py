"""A layer's tokens to experts over several ranks: two calls to the host, round the experts here.

A row goes once to each rank that holds any of its experts, and each (token, choice) pair's output,
rounded to the model's dtype, comes home to be summed there. So the sum is that of one process, term
by term, whoever computed a term.

Shapes: R rows received, C rows of an owners table; the others as in moebius.ops.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from moebius.moe.experts import Experts
from moebius.moe.router import Routing
from moebius.ops import Ops
from moebius.ops.host import HostResult
from moebius.ops.program import Rows
from moebius.parallel.exchange import Exchange

RECEIVED = "received rows"


class Shares(Protocol):
    """What it asks of this rank: see moebius.moe.ranks.ExpertRank."""

    received: Rows

    @property
    def exchange(self) -> Exchange: ...

    def owners(self, layer: int) -> Tensor: ...


class AllToAllDispatcher:
    """One layer's."""

    def __init__(self, ops: Ops, ranks: Shares, layer: int) -> None:
        self.ops = ops
        self.ranks = ranks
        self.layer = layer

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        assert routing.kept_TK is None, "only training drops choices"
        size = x_TD.shape[1:]
        top_k = routing.expert_ids_TK.shape[1:]
        received = self.ranks.received
        rows_RD, ids_RK = self.ops.host(
            self._send,
            [x_TD, routing.expert_ids_TK],
            [
                HostResult(received, size, x_TD.dtype),
                HostResult(received, top_k, routing.expert_ids_TK.dtype),
            ],
        )
        outputs_RKD = experts.rows(rows_RD, ids_RK)
        home = HostResult(x_TD, (*top_k, *size), x_TD.dtype)
        (back_TKD,) = self.ops.host(self._bring_back, [outputs_RKD], [home])
        return self.ops.combine(back_TKD, routing.weights_TK)

    def _send(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        x_TD, ids_TK = inputs
        rows_RD, ids_RK = outputs
        owners_CE = self.ranks.owners(self.layer)
        count = self.ranks.exchange.dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        return {RECEIVED: count}

    def _bring_back(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        self.ranks.exchange.combine(inputs[0], outputs[0])
        return {}
