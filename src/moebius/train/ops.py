"""The reference operations, with what training on a CPU gains from: the same formulas, fewer and
larger passes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops import Pair
from moebius.ops.reference import ReferenceOps

# Rows whose logits exist at a time.
LOSS_ROWS = 512


class TrainingOps(ReferenceOps):
    """Reference operations with a norm in one pass, and dropout while `training`.

    dropout          on what a part adds to the residual stream, and within dense feed-forwards
    expert_dropout   within experts behind a router
    drops            routers have a capacity
    """

    name = "training"

    def __init__(
        self, dropout: float = 0.0, expert_dropout: float = 0.0, *, drops: bool = False
    ) -> None:
        self.drops, self.training = drops, False
        self._dropout, self._expert_dropout = dropout, expert_dropout

    def dropout(self, x: Tensor, *, routed: bool) -> Tensor:
        share = self._expert_dropout if routed else self._dropout
        return F.dropout(x, share) if self.training and share else x

    def add_rms_norm(
        self, x_TD: Tensor, update_TD: Tensor, multiplier: float, weight_D: Tensor, eps: float
    ) -> Pair:
        return super().add_rms_norm(
            x_TD, self.dropout(update_TD, routed=False), multiplier, weight_D, eps
        )

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x_TD, (x_TD.shape[-1],), weight_D.to(x_TD.dtype), eps)

    def rotary(self, x_THN: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        # Widened as a whole first: torch's products of mixed dtypes are not vectorised.
        return super().rotary(x_THN.float(), cos_TR, sin_TR).to(x_THN.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear layer's logits, whose (T, V) matrix never exists as a
    whole."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        grad_x_TD = torch.empty_like(x_TD)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=x_TD.device)
        total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        for start in range(0, len(x_TD), LOSS_ROWS):
            x_LD, target_L = (
                x_TD[start : start + LOSS_ROWS],
                target_T[start : start + LOSS_ROWS].unsqueeze(1),
            )
            logits_LV = (x_LD @ weight_VD.T).float()
            log_sum_L = torch.logsumexp(logits_LV, dim=-1, keepdim=True)
            total += (log_sum_L - logits_LV.gather(1, target_L)).sum()
            error_LV = (
                logits_LV.sub_(log_sum_L)
                .exp_()
                .scatter_add_(1, target_L, -torch.ones_like(log_sum_L))
            )
            error = error_LV.to(x_TD.dtype)
            grad_x_TD[start : start + LOSS_ROWS] = error @ weight_VD
            grad_weight_VD += error.T @ x_LD
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        return total / len(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0] / len(grad_x_TD)
        return (
            grad_x_TD * scale.to(grad_x_TD.dtype),
            (grad_weight_VD * scale).to(grad_x_TD.dtype),
            None,
        )


def cross_entropy(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean over T of -log softmax(x W^T)[target], in nats: products in x's dtype, everything else
    in float32.

    The gradient is worked out in the forward pass, LOSS_ROWS rows at a time, so that memory does
    not grow with T·V.
    """
    loss: Tensor = _CrossEntropy.apply(x_TD, weight_VD, target_T)  # type: ignore[no-untyped-call]
    return loss
