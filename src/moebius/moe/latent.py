"""Experts that compute on fewer values than the model is wide (latent mixture of experts, as
Nemotron 3 has it): a matrix before them, and one behind their weighted sum. Routers and the expert
that is always on see the model's width.

Shapes: L values that experts see, D that a group of ranks exchanges; the others as in all_to_all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from moebius.errors import ConfigError
from moebius.moe.all_to_all import AllToAllDispatcher
from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import Dispatcher
from moebius.moe.experts import Experts
from moebius.moe.router import Routing
from moebius.nn.linear import Linear
from moebius.nn.spec import Place


def narrowed(
    config: FeedForwardConfig, place: Place, dispatch: Dispatcher
) -> tuple[Place, Dispatcher]:
    """Where a layer's experts stand, as wide as they are, and how tokens get to them."""
    if config.latent is None:
        return place, dispatch
    if not 1 <= config.latent <= place.hidden_size:
        raise ConfigError(
            f"experts compute on {config.latent} values of a token; there must be 1 to "
            f"hidden_size = {place.hidden_size}"
        )
    if isinstance(dispatch, AllToAllDispatcher):
        dispatch = _NarrowRows(dispatch.ops, dispatch.ranks, dispatch.layer)
    inner = replace(place, hidden_size=config.latent)
    return inner, LatentDispatcher(config.latent, place, dispatch)


class LatentDispatcher(nn.Module):
    """Another dispatcher, of rows of L values."""

    def __init__(self, latent: int, place: Place, dispatch: Dispatcher) -> None:
        super().__init__()
        self._dispatch = dispatch
        self.down = Linear(place.ops, place.hidden_size, latent, dtype=place.dtype)
        self.up = Linear(place.ops, latent, place.hidden_size, dtype=place.dtype)

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        out_TD: Tensor = self.up(self._dispatch(self.down(x_TD), routing, experts))
        return out_TD


class _NarrowRows(AllToAllDispatcher):
    """Rows go from rank to rank with what is left of D values behind them."""

    def _send(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        x_TL, ids_TK = inputs
        rows_RL, ids_RK = outputs
        rows_RD = self._widened(rows_RL)
        counts = super()._send((self._widened(x_TL), ids_TK), (rows_RD, ids_RK))
        rows_RL.copy_(rows_RD[:, : rows_RL.shape[1]])
        return counts

    def _bring_back(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        (outputs_RKL,) = inputs
        (back_TKL,) = outputs
        back_TKD = self._widened(back_TKL)
        counts = super()._bring_back((self._widened(outputs_RKL),), (back_TKD,))
        back_TKL.copy_(back_TKD[..., : back_TKL.shape[-1]])
        return counts

    def _widened(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.ranks.exchange.spec.hidden - x.shape[-1]))
