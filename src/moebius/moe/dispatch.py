"""How a layer's tokens get to their experts and back; over several ranks: all_to_all.py."""

from typing import Protocol

from torch import Tensor

from moebius.moe.experts import Experts
from moebius.moe.router import Routing


class Dispatcher(Protocol):
    """Brings every (token, expert) pair to the rank that holds the expert, and the weighted sum
    back: (T, D). Nothing else knows about ranks."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


class LocalDispatcher:
    """All experts are here."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        ids_TK = routing.expert_ids_TK
        if routing.kept_TK is not None:
            # The number after the last expert's stands for none.
            ids_TK = ids_TK.masked_fill(~routing.kept_TK, routing.logits_TE.shape[1])
        out_TD: Tensor = experts(x_TD, routing.weights_TK, ids_TK)
        return out_TD
