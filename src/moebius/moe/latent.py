"""Experts that compute on fewer values than the model is wide (latent mixture of experts, as
Nemotron 3 has it): a matrix before them, and one behind their weighted sum. Routers and the expert
that is always on see the model's width."""

from dataclasses import replace

from torch import Tensor, nn

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
    inner = replace(place, hidden_size=config.latent)
    return inner, LatentDispatcher(config.latent, place, dispatch)


class LatentDispatcher(nn.Module):
    """Another dispatcher, of rows of `latent` values."""

    def __init__(self, latent: int, place: Place, dispatch: Dispatcher) -> None:
        super().__init__()
        self._dispatch = dispatch
        self.down = Linear(place.ops, place.hidden_size, latent, dtype=place.dtype)
        self.up = Linear(place.ops, latent, place.hidden_size, dtype=place.dtype)

    def forward(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        out_TD: Tensor = self.up(self._dispatch(self.down(x_TD), routing, experts))
        return out_TD
