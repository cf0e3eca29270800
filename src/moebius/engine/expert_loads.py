"""How a decoder's routers spread the tokens that it computes: counted by the routing operation,
read when asked for."""

import math
from collections import deque
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.engine.client import ExpertLoads, LayerLoad
from moebius.models.decoder import Decoder
from moebius.moe import health
from moebius.ops import RouterTally

# Figures are of the last 1 to 2 times so many steps: enough to mean something, few enough to show
# what is going on.
WINDOW_STEPS = 1000


class _Mark(NamedTuple):
    """All tallies as they were after so many steps."""

    steps: int
    pairs: Tensor
    sums: Tensor


class ExpertCounts:
    """The tallies of all of a model's routers in two tensors; making it gives every router its
    part.

    One thread computes steps; others may read meanwhile, and then see a part of the step under way.
    """

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self._routers = list(model.routers.items())
        self._sizes = [router.config.num_experts for _, router in self._routers]
        # All layers' experts side by side, and two sums a layer: see RouterTally.
        self._pairs = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._sums = torch.zeros(len(self._sizes), 2, dtype=torch.float64, device=device)
        for (_, router), pairs_E, sums in zip(
            self._routers, torch.split(self._pairs, self._sizes), self._sums, strict=True
        ):
            router.tally = RouterTally(pairs_E, sums)
        self.clear()

    def clear(self) -> None:
        """Count from zero: what warmed up was nobody's."""
        self._pairs.zero_()
        self._sums.zero_()
        self._steps = 0
        self._marks = deque([self._mark()], maxlen=2)

    def step(self) -> None:
        """A step has been computed."""
        self._steps += 1
        if self._steps % WINDOW_STEPS == 0 and self._routers:
            self._marks.append(self._mark())

    def read(self) -> ExpertLoads:
        """The figures of the steps since the older mark."""
        now = self._mark()
        since = self._marks[0]
        pairs = now.pairs - since.pairs
        sums = now.sums - since.sums
        columns = zip(
            torch.split(pairs, self._sizes),
            torch.split(now.pairs, self._sizes),
            sums.tolist(),
            strict=True,
        )
        layers = [
            _layer_load(layer, router.config.top_k, pairs_E, total_E, nats, tokens)
            for (layer, router), (pairs_E, total_E, (nats, tokens)) in zip(
                self._routers, columns, strict=True
            )
        ]
        return ExpertLoads(now.steps - since.steps, tuple(layers))

    def _mark(self) -> _Mark:
        return _Mark(self._steps, self._pairs.to("cpu", copy=True), self._sums.to("cpu", copy=True))


def _layer_load(
    layer: int, top_k: int, pairs_E: Tensor, total_E: Tensor, nats: float, tokens: float
) -> LayerLoad:
    """nats is the sum of the entropies of `tokens` tokens: of all but those whose numbers went
    wrong."""
    pairs = tuple(pairs_E.tolist())
    load = LayerLoad(
        layer=layer,
        top_k=top_k,
        tokens=sum(pairs) // top_k,
        max_over_mean=math.nan,
        cv=math.nan,
        router_entropy=nats / tokens if tokens else math.nan,
        dead=(),
        pairs=pairs,
        total_pairs=tuple(total_E.tolist()),
    )
    if not any(pairs):
        return load
    return replace(
        load,
        max_over_mean=float(health.max_over_mean(pairs_E)),
        cv=float(health.coefficient_of_variation(pairs_E)),
        dead=tuple(health.dead_experts(pairs_E).nonzero().flatten().tolist()),
    )
