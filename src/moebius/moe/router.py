"""The router: one linear layer and a choice of experts, in float32 (arXiv 2101.03961 section 2.4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moebius.config import RouterConfig
from moebius.ops import Ops


class Routing(NamedTuple):
    """Where one layer sent its tokens.

    weights_TK      float32, what each chosen expert's output is multiplied by
    expert_ids_TK   int64, best first, ties to the lowest id
    logits_TE       float32, for the losses and for inspection
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    logits_TE: Tensor


class Router(nn.Module):
    """weight (E, D); bias (E,) and selection_bias (E,) where the architecture has them."""

    def __init__(self, ops: Ops, config: RouterConfig, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops, self.config = ops, config
        self._prepared: Any = None
        self.weight = nn.Parameter(torch.empty(config.num_experts, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(config.num_experts, dtype=dtype)) if config.logit_bias else None
        self.selection_bias: nn.Parameter | None = None
        if config.selection_bias:
            self.selection_bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Routing:
        if self._prepared is None:
            self._prepared = self.ops.prepare_linear((self.weight, self.bias))
        logits_TE = self.ops.logits(x_TD, self._prepared)
        return Routing(*self.ops.route(logits_TE, self.config, self.selection_bias), logits_TE)
