"""Rows from the order of tokens into the order of experts, and back: permutations, differentiable.

Each is the other's gradient. torch's own for index_select adds rows up by atomics on a GPU, in
another order each time; here a token's gradients are added in its choices' order.

Shape legend: T tokens, K choices a token, P = T * K pairs of both, sorted by expert; D row size.
"""

from typing import Any

import torch
from torch import Tensor


def to_experts(x_TD: Tensor, order_P: Tensor, k: int, count: int | None = None) -> Tensor:
    """The rows of the first `count` choices in this order (None: of all), (count, D)."""
    if not torch.is_grad_enabled():
        return _rows_of(x_TD, order_P[:count], k)
    rows_PD: Tensor = _ToExperts.apply(x_TD, order_P, k, count)  # type: ignore[no-untyped-call]
    return rows_PD


def in_choices(out_PD: Tensor, order_P: Tensor, k: int) -> Tensor:
    """Outputs of choices in the order in which they were taken, each in its place (T, K, D).

    order_P: all choices in that order; those that there is no output for, the last, get zeros.
    """
    if not torch.is_grad_enabled():
        return _in_place(out_PD, order_P, k)
    out_TKD: Tensor = _InChoices.apply(out_PD, order_P, k)  # type: ignore[no-untyped-call]
    return out_TKD


def _rows_of(x_TD: Tensor, chosen_P: Tensor, k: int) -> Tensor:
    tokens_P = chosen_P.div(k, rounding_mode="floor") if k > 1 else chosen_P
    return x_TD.index_select(0, tokens_P)


def _in_place(out_PD: Tensor, order_P: Tensor, k: int) -> Tensor:
    missing = len(order_P) - len(out_PD)
    if missing:
        out_PD = torch.cat((out_PD, out_PD.new_zeros(missing, out_PD.shape[1])))
    position_P = torch.empty_like(order_P)
    position_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    return out_PD.index_select(0, position_P).view(-1, k, out_PD.shape[1])


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, k: int, count: int | None) -> Tensor:
        ctx.save_for_backward(order_P)
        ctx.k = k
        return _rows_of(x_TD, order_P[:count], k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order_P,) = ctx.saved_tensors
        grad_TKD = _in_place(grads[0], order_P, ctx.k)
        if ctx.k == 1:
            return grad_TKD[:, 0], None, None, None
        total_TD = grad_TKD[:, 0].float()
        for choice in range(1, ctx.k):
            total_TD = total_TD + grad_TKD[:, choice]
        return total_TD.to(grad_TKD.dtype), None, None, None


class _InChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_PD: Tensor, order_P: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order_P[: len(out_PD)])
        return _in_place(out_PD, order_P, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (chosen_P,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, chosen_P), None, None
