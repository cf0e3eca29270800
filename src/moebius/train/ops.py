"""The reference operations as training computes them: the same formulas in fewer passes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.moe.share import WHOLE_BATCH
from moebius.ops import Pair, Rotation
from moebius.train.experts import TrainedExpertOps

# Rows whose logits exist at a time: at least so many, and on a GPU so many bytes of them.
LOSS_ROWS = 512
LOSS_BYTES = 2**28


class TrainingOps(TrainedExpertOps):
    """Reference operations with a norm in one pass, and dropout while `training`.

    dropout          on what a part adds to the residual stream, and within dense feed-forwards
    expert_dropout   within experts behind a router
    drops            routers have a capacity
    device           where it will be computed
    tokens, choices  which of a batch's tokens, and of the choices that experts compute, are here
    """

    name = "training"

    def __init__(
        self,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        *,
        drops: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(device)
        self.drops = drops
        self.training = False
        self.tokens = WHOLE_BATCH
        self.choices = WHOLE_BATCH
        self._dropout = dropout
        self._expert_dropout = expert_dropout

    def dropout_mask(self, like: Tensor, width: int, *, routed: bool) -> Tensor | None:
        share = self._expert_dropout if routed else self._dropout
        if not (self.training and share):
            return None
        part = self.choices if routed else self.tokens
        rows = like.new_empty(len(like), width)
        return part.drawn(rows, lambda mask: mask.bernoulli_(1 - share).div_(1 - share))

    def add_rms_norm(
        self,
        x_TD: Tensor,
        update_TD: Tensor,
        multiplier: float,
        weight_D: Tensor,
        eps: float,
        *,
        less_mean: bool = False,
        scale_1: Tensor | None = None,
    ) -> Pair:
        mask_TD = self.dropout_mask(update_TD, update_TD.shape[1], routed=False)
        if mask_TD is not None:
            update_TD = update_TD * mask_TD
        return super().add_rms_norm(
            x_TD, update_TD, multiplier, weight_D, eps, less_mean=less_mean, scale_1=scale_1
        )

    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, *, less_mean: bool = False
    ) -> Tensor:
        if less_mean:
            return F.layer_norm(x_TD, (x_TD.shape[-1],), weight_D.to(x_TD.dtype), eps=eps)
        return F.rms_norm(x_TD, (x_TD.shape[-1],), weight_D.to(x_TD.dtype), eps)

    def rotary(self, x_THN: Tensor, rotation: Rotation) -> Tensor:
        # Widened as a whole first: torch's products of mixed dtypes are not vectorised.
        return super().rotary(x_THN.float(), rotation).to(x_THN.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear layer's logits, never all of them at once."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        grad_x_TD = torch.empty_like(x_TD)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=x_TD.device)
        total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        step = LOSS_ROWS
        if x_TD.is_cuda:
            step = max(step, LOSS_BYTES // (4 * len(weight_VD)))
        for start in range(0, len(x_TD), step):
            rows = slice(start, start + step)
            x_LD = x_TD[rows]
            target_L1 = target_T[rows].unsqueeze(1)
            logits_LV = (x_LD @ weight_VD.T).float()
            log_sum_L1 = torch.logsumexp(logits_LV, dim=-1, keepdim=True)
            total += (log_sum_L1 - logits_LV.gather(1, target_L1)).sum()
            # In place: softmax - onehot(target), the loss's gradient by the logits.
            probability_LV = logits_LV.sub_(log_sum_L1).exp_()
            error_LV = probability_LV.scatter_add_(1, target_L1, -torch.ones_like(log_sum_L1))
            error_LV = error_LV.to(x_TD.dtype)
            grad_x_TD[rows] = error_LV @ weight_VD
            grad_weight_VD += error_LV.T @ x_LD
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        return total / len(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        scale = grads[0] / len(grad_x_TD)
        grad_weight = (grad_weight_VD * scale).to(grad_x_TD.dtype)
        return grad_x_TD * scale.to(grad_x_TD.dtype), grad_weight, None


def cross_entropy(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """Mean over T of -log softmax(x W^T)[target], in nats.

    Products are in x's dtype, everything else in float32. The gradient is worked out in the forward
    pass, LOSS_ROWS rows at a time, so that memory does not grow with T·V.
    """
    loss: Tensor = _CrossEntropy.apply(x_TD, weight_VD, target_T)  # type: ignore[no-untyped-call]
    return loss
