"""What a training step measures: its losses and where its tokens went, added up by name.

Shape legend: S layers with a router, E experts.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.moe.losses import chosen_counts
from moebius.moe.router import Routing


class Losses(NamedTuple):
    """A micro-batch's losses, scalars in nats a token; the last two are 0 without a router."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor


class StepReport(NamedTuple):
    """What a step measured, before its update, over all its micro-batches. Losses in nats a token.

    counts (S, E): how many choices of each expert there were; dropped (S,): which share of them
    found no room. Both are on the CPU. finite: all of it is numbers.
    """

    loss: float
    balance: float
    z: float
    grad_norm: float
    learning_rate: float
    counts: Tensor
    dropped: Tensor
    finite: bool = True


class StepSums:
    """The sums over a step's micro-batches. Each part is a view of `vector`, which ranks add up.

    losses      (3,) the means of `Losses` over the step
    dropped_S   the share of each layer's choices that found no room
    counts_SE   how many choices of each expert there were, before any capacity
    square      (1,) the squared norm of the gradient of weights that one rank alone has
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._sizes = [len(Losses._fields), layers, layers * experts, 1]
        self.vector = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self.losses, self.dropped_S, counts, self.square = torch.split(self.vector, self._sizes)
        self.counts_SE = counts.view(layers, experts)

    def add(self, losses: Losses, routings: Sequence[Routing], parts: int) -> None:
        """Add what one of the step's `parts`, which are of equal size, measured."""
        self.losses += _detached(losses) / parts
        if routings:
            self.dropped_S += _detached(map(_dropped_share, routings)) / parts
            self.counts_SE += torch.stack([chosen_counts(r)[0] for r in routings])

    def report(self, grad_norm: Tensor, learning_rate: float) -> StepReport:
        """All in one copy, for which the device is waited for."""
        there = torch.cat((self.vector, grad_norm.double().reshape(1)))
        here = there.cpu()
        losses, dropped_S, counts, _, norm = torch.split(here, [*self._sizes, 1])
        loss, balance, z = losses.tolist()
        return StepReport(
            loss,
            balance,
            z,
            grad_norm=norm.item(),
            learning_rate=learning_rate,
            counts=counts.view(self.counts_SE.shape),
            dropped=dropped_S,
            finite=bool(torch.isfinite(here).all()),
        )


def _detached(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.detach().float() for value in values])


def _dropped_share(routing: Routing) -> Tensor:
    if routing.kept_TK is None:
        return torch.zeros((), device=routing.logits_TE.device)
    return 1 - routing.kept_TK.float().mean()
