"""Experts in plain PyTorch: differentiable, nothing loops over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.config import Activation, ActivationWord, ClampedSwiGLU, RouterConfig
from moebius.ops.interface import Ops
from moebius.ops.prepared import PreparedExperts, StatePlan, own, same
from moebius.ops.reference.choices import in_choices, to_experts
from moebius.ops.reference.linear import widened_for
from moebius.ops.reference.recurrent import ReferenceStatePlan
from moebius.ops.reference.routing import count, route
from moebius.ops.steps import ExpertWeights, Pair, RouterTally
from moebius.ops.weights import Matrix, Weight


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceExperts(PreparedExperts):
    """The tensors themselves."""

    weights: ExpertWeights
    activation: Activation

    def is_of(self, weights: ExpertWeights) -> bool:
        return all(map(same, weights, self.weights))


def activate(x: Tensor, activation: ActivationWord) -> Tensor:
    """The feed-forward's nonlinearity."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "relu_squared":
        return F.relu(x).square()
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
        expert_scale_E: Tensor | None = None,
    ) -> Pair:
        weights_TK, ids_TK = route(logits_TE, config, selection_bias_E, expert_scale_E)
        if tally is not None:
            count(tally, logits_TE, ids_TK, config)
        return weights_TK, ids_TK

    def within_capacity(
        self,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        num_experts: int,
        capacity: int,
        plan: StatePlan,
    ) -> Tensor:
        sequence_T = own(plan, ReferenceStatePlan).sequence
        queue_P = (sequence_T.unsqueeze(1) * num_experts + expert_ids_TK).flatten()
        order_P = torch.argsort(queue_P, stable=True)
        sorted_P = queue_P[order_P]
        place_P = torch.empty_like(order_P)
        at_P = torch.arange(len(order_P), device=order_P.device)
        place_P[order_P] = at_P - torch.searchsorted(sorted_P, sorted_P)
        return weights_TK.where(place_P.view_as(expert_ids_TK) < capacity, 0.0)

    def prepare_experts(
        self,
        weights: ExpertWeights,
        activation: Activation,
        dtype: torch.dtype | None = None,
        *,
        on_disk: bool = False,
    ) -> PreparedExperts:
        if isinstance(activation, ClampedSwiGLU) and not weights.up_FD:
            raise ValueError("ClampedSwiGLU joins two matrices, and these experts have only a gate")
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
            mask_TF = self.dropout_mask(x_TD, prepared.weights.width, routed=False)
            return _one_expert(x_TD, prepared, 0, mask_TF)
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
        k = ids_TK.shape[1]
        num_experts = len(weights.gate_FD)
        flat_ids = ids_TK.reshape(-1)
        order = torch.argsort(flat_ids, stable=True)
        taken = int((flat_ids < num_experts).sum()) if drops else len(order)
        rows_PD = to_experts(x_TD, order, k, taken)
        mask_PF = self.dropout_mask(rows_PD, weights.width, routed=True)
        if torch.is_grad_enabled() and _can_stack(weights, x_TD):
            ends_H = _ends(flat_ids[order[:taken]], weights)
            out_PD = _experts_stacked(rows_PD, ends_H, prepared, mask_PF)
        else:
            counts = torch.bincount(flat_ids, minlength=num_experts)[:num_experts].tolist()
            out_PD = _experts_in_turn(rows_PD, counts, prepared, mask_PF)
        return in_choices(out_PD, order, k)

    def dropout_mask(self, like: Tensor, width: int, *, routed: bool) -> Tensor | None:
        """What fine-tuning multiplies the inner values of as many rows with, None for nothing:
        those of experts behind a router, or of a dense feed-forward."""
        return None


def weighted_sum(out_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum over k, in routing order, in float32: (T, D) float32."""
    total = out_TKD[:, 0].float() * weights_TK[:, :1]
    for k in range(1, out_TKD.shape[1]):
        total = torch.addcmul(total, out_TKD[:, k].float(), weights_TK[:, k : k + 1])
    return total


def _bias(biases: Sequence[Tensor | None], e: int) -> Tensor | None:
    return biases[e] if biases else None


def inner_values(
    gate: Tensor, up: Tensor | None, activation: Activation, mask: Tensor | None
) -> Tensor:
    """From an expert's gate and up to what down reads."""
    if isinstance(activation, ClampedSwiGLU):
        assert up is not None, "prepare_experts has seen to it"
        inner = _clamped_swiglu(gate, up, activation)
    else:
        inner = activate(gate, activation)
        if up is not None:
            inner = inner * up
    return inner if mask is None else inner * mask


def _clamped_swiglu(gate: Tensor, up: Tensor, settings: ClampedSwiGLU) -> Tensor:
    g = gate.float().clamp(max=settings.limit)
    u = up.float().clamp(-settings.limit, settings.limit)
    return ((u + 1) * (g * torch.sigmoid(settings.alpha * g))).to(gate.dtype)


def _one_expert(x_TD: Tensor, experts: ReferenceExperts, e: int, mask_TF: Tensor | None) -> Tensor:
    def product(
        x: Tensor, weights: Sequence[Weight | None], biases: Sequence[Tensor | None]
    ) -> Tensor:
        weight = weights[e]
        if weight is None:
            raise IndexError(f"expert {e} is not held here")
        return F.linear(x, widened_for(x, weight), _bias(biases, e))

    w = experts.weights
    gate = product(x_TD, w.gate_FD, w.gate_bias_F)
    up = product(x_TD, w.up_FD, w.up_bias_F) if w.up_FD else None
    return product(inner_values(gate, up, experts.activation, mask_TF), w.down_DF, w.down_bias_D)


def _experts_in_turn(
    rows_PD: Tensor, counts: list[int], experts: ReferenceExperts, mask_PF: Tensor | None
) -> Tensor:
    """Rows sorted by expert through their experts, one product an expert that has rows; no weight
    is copied."""
    masks: Sequence[Tensor | None] = [None] * len(counts)
    if mask_PF is not None:
        masks = torch.split(mask_PF, counts)
    parts = [
        _one_expert(rows, experts, e, masks[e])
        for e, rows in enumerate(torch.split(rows_PD, counts))
        if len(rows)
    ]
    if parts:
        return torch.cat(parts)
    if torch.is_grad_enabled():
        # No rows are still rows that a gradient passes, as it does on ranks that have some.
        first = next(e for e, weight in enumerate(experts.weights.gate_FD) if weight is not None)
        return _one_expert(rows_PD, experts, first, None)
    return rows_PD


def _can_stack(w: ExpertWeights, x_TD: Tensor) -> bool:
    """torch.grouped_mm wants rows of a multiple of 16 bytes, and adds no bias. On a GPU it is not
    used, for the reasons in moebius.ops.triton.grouped. Quantised experts would all have to be
    widened at once."""
    dtype = _compute_dtype(x_TD)
    if any(isinstance(weight, Matrix) for kind in w[:3] for weight in kind):
        return False
    if w.down_bias_D or x_TD.is_cuda:
        return False
    return all(size * dtype.itemsize % 16 == 0 for size in (w.width, x_TD.shape[1]))


def _ends(sorted_ids_P: Tensor, w: ExpertWeights) -> Tensor:
    """Where the rows of each expert that is here end (H,)."""
    held = [e for e, weight in enumerate(w.gate_FD) if weight is not None]
    if len(held) == len(w.gate_FD):
        every_E = torch.arange(len(held), device=sorted_ids_P.device)
        return torch.searchsorted(sorted_ids_P, every_E, right=True, out_int32=True)
    held_H = torch.tensor(held, device=sorted_ids_P.device)
    ends_H = torch.searchsorted(sorted_ids_P, held_H, right=True, out_int32=True)
    starts_H = torch.searchsorted(sorted_ids_P, held_H, out_int32=True)
    if int((ends_H - starts_H).sum()) != len(sorted_ids_P):
        raise IndexError(f"only experts {held} are held here; others were chosen")
    return ends_H


def _experts_stacked(
    rows_PD: Tensor, ends_H: Tensor, experts: ReferenceExperts, mask_PF: Tensor | None
) -> Tensor:
    """The same in two or three grouped products, for training: few launches, no wait for the device
    to count rows. All rows are of experts that are here."""
    dtype = _compute_dtype(rows_PD)
    rows = rows_PD.to(dtype)

    def product(x: Tensor, weights: Sequence[Weight | None]) -> Tensor:
        held = [weight for weight in weights if isinstance(weight, Tensor)]
        return F.grouped_mm(x, torch.stack(held).to(dtype).transpose(1, 2), offs=ends_H)

    w = experts.weights
    gate = product(rows, w.gate_FD)
    up = product(rows, w.up_FD) if w.up_FD else None
    return product(inner_values(gate, up, experts.activation, mask_PF), w.down_DF)
