"""Experts in plain PyTorch: differentiable, nothing loops over tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.config import Activation, RouterConfig
from moebius.ops.interface import Ops
from moebius.ops.prepared import PreparedExperts, own, same
from moebius.ops.reference.linear import widened_for
from moebius.ops.reference.routing import count, route
from moebius.ops.steps import ExpertWeights, Pair, RouterTally
from moebius.ops.weights import Matrix, Weight

Hidden = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceExperts(PreparedExperts):
    """The tensors themselves."""

    weights: ExpertWeights
    activation: Activation

    def is_of(self, weights: ExpertWeights) -> bool:
        return all(map(same, weights, self.weights))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The feed-forward's nonlinearity."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ExpertOps(Ops):
    """Experts that may also be trained.

    drops   an id of E stands for no expert, as training's may; to look costs a wait for the device
    """

    drops = False

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
    ) -> Pair:
        weights_TK, ids_TK = route(logits_TE, config, selection_bias_E)
        if tally is not None:
            count(tally, logits_TE, ids_TK, config)
        return weights_TK, ids_TK

    def prepare_experts(
        self, weights: ExpertWeights, activation: Activation, dtype: torch.dtype | None = None
    ) -> PreparedExperts:
        return ReferenceExperts(weights, activation)

    def experts(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        expert_ids_TK: Tensor | None,
        experts: PreparedExperts,
    ) -> Tensor:
        prepared = own(experts, ReferenceExperts)
        if weights_TK is None or expert_ids_TK is None:
            hidden = self._hidden(prepared.activation, routed=False)
            return _one_expert(x_TD, prepared.weights, 0, hidden)
        rows_TKD = self._rows(x_TD, expert_ids_TK, prepared, drops=self.drops)
        return weighted_sum(rows_TKD, weights_TK).to(x_TD.dtype)

    def expert_rows(self, x_RD: Tensor, expert_ids_RK: Tensor, experts: PreparedExperts) -> Tensor:
        return self._rows(x_RD, expert_ids_RK, own(experts, ReferenceExperts), drops=True)

    def combine(self, x_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        return weighted_sum(x_TKD, weights_TK).to(x_TKD.dtype)

    def _rows(
        self, x_TD: Tensor, ids_TK: Tensor, prepared: ReferenceExperts, *, drops: bool
    ) -> Tensor:
        """Each choice's output (T, K, D). drops: an id of E stands for none, whose row is zeros."""
        weights = prepared.weights
        hidden = self._hidden(prepared.activation, routed=True)
        tokens, k = ids_TK.shape
        num_experts = len(weights.gate_FD)
        flat_ids = ids_TK.reshape(-1)
        order = torch.argsort(flat_ids, stable=True)
        chosen = order[: int((flat_ids < num_experts).sum())] if drops else order
        rows_PD = x_TD.index_select(0, chosen.div(k, rounding_mode="floor") if k > 1 else chosen)
        if torch.is_grad_enabled() and _can_stack(weights, x_TD):
            every_E = torch.arange(num_experts, device=x_TD.device)
            ends = torch.searchsorted(flat_ids[order], every_E, right=True)
            out_PD = _experts_stacked(rows_PD, ends.to(torch.int32), weights, hidden)
        else:
            counts = torch.bincount(flat_ids, minlength=num_experts)[:num_experts].tolist()
            out_PD = _experts_in_turn(rows_PD, counts, weights, hidden)
        if len(chosen) < len(order):
            out_PD = torch.cat(
                (out_PD, out_PD.new_zeros(len(order) - len(chosen), out_PD.shape[1]))
            )
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        return out_PD.index_select(0, position).view(tokens, k, x_TD.shape[-1])

    def _hidden(self, activation: Activation, *, routed: bool) -> Hidden:
        """From an expert's gate and up to what down reads."""

        def hidden(gate: Tensor, up: Tensor | None) -> Tensor:
            inner = activate(gate, activation)
            return self.dropout(inner if up is None else inner * up, routed=routed)

        return hidden

    def dropout(self, x: Tensor, *, routed: bool) -> Tensor:
        """What fine-tuning does to the inner values of a feed-forward, of experts behind a router
        or of a dense one."""
        return x


def weighted_sum(out_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum over k, in routing order, in float32: (T, D) float32."""
    total = out_TKD[:, 0].float() * weights_TK[:, :1]
    for k in range(1, out_TKD.shape[1]):
        total = torch.addcmul(total, out_TKD[:, k].float(), weights_TK[:, k : k + 1])
    return total


def _bias(biases: Sequence[Tensor | None], e: int) -> Tensor | None:
    return biases[e] if biases else None


def _one_expert(x_TD: Tensor, w: ExpertWeights, e: int, hidden: Hidden) -> Tensor:
    def product(
        x: Tensor, weights: Sequence[Weight | None], biases: Sequence[Tensor | None]
    ) -> Tensor:
        weight = weights[e]
        if weight is None:
            raise IndexError(f"expert {e} is not held here")
        return F.linear(x, widened_for(x, weight), _bias(biases, e))

    gate = product(x_TD, w.gate_FD, w.gate_bias_F)
    up = product(x_TD, w.up_FD, w.up_bias_F) if w.up_FD else None
    return product(hidden(gate, up), w.down_DF, w.down_bias_D)


def _experts_in_turn(
    rows_PD: Tensor, counts: list[int], w: ExpertWeights, hidden: Hidden
) -> Tensor:
    """Rows sorted by expert through their experts, one product an expert that has rows; no weight
    is copied."""
    parts = [
        _one_expert(rows, w, e, hidden)
        for e, rows in enumerate(torch.split(rows_PD, counts))
        if len(rows)
    ]
    return torch.cat(parts) if parts else rows_PD.new_zeros(rows_PD.shape)


def _can_stack(w: ExpertWeights, x_TD: Tensor) -> bool:
    """torch.grouped_mm wants rows of a multiple of 16 bytes, bfloat16 on a GPU, and adds no bias;
    a hole has nothing to stack."""
    dtype = _compute_dtype(x_TD)
    if w.down_bias_D or (x_TD.is_cuda and dtype != torch.bfloat16):
        return False
    sizes = [None if weight is None else weight.shape for weight in w.gate_FD]
    if sizes[0] is None or None in sizes:
        return False
    return all(size * dtype.itemsize % 16 == 0 for size in sizes[0])


def _experts_stacked(rows_PD: Tensor, ends_E: Tensor, w: ExpertWeights, hidden: Hidden) -> Tensor:
    """The same in two or three grouped products, for training: few launches, no wait for the device
    to count rows."""
    dtype = _compute_dtype(rows_PD)
    rows = rows_PD.to(dtype)

    def product(x: Tensor, weights: Sequence[Weight | None]) -> Tensor:
        held = [
            weight for weight in weights if weight is not None
        ]  # all of them, as _can_stack says
        stored = [w.widened(dtype) if isinstance(w, Matrix) else w for w in held]
        return F.grouped_mm(x, torch.stack(stored).to(dtype).transpose(1, 2), offs=ends_E)

    gated = hidden(product(rows, w.gate_FD), product(rows, w.up_FD) if w.up_FD else None)
    return product(gated, w.down_DF)
