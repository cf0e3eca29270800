"""Routers by a Triton kernel."""

import torch
import triton
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.config import RouterConfig
from moebius.ops.prepared import StatePlan, own
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Pair, RouterTally
from moebius.ops.triton.kernels import routing as kernels
from moebius.ops.triton.recurrent import TritonStatePlan
from moebius.ops.triton.weights import trained

OPERATIONS = frozenset({Operation.ROUTE, Operation.WITHIN_CAPACITY})
# Choices, or tokens, that are looked at in one step.
_LOOKED_AT = 1024


class RoutingOps(ReferenceOps):
    """Choices of all kinds of RouterConfig."""

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
        expert_scale_E: Tensor | None = None,
    ) -> Pair:
        if logits_TE.dtype != torch.float32 or trained([logits_TE, expert_scale_E]):
            return super().route(logits_TE, config, selection_bias_E, tally, expert_scale_E)
        bias = _of_experts("a selection bias", selection_bias_E, config)
        scale = _of_experts("a scale of experts", expert_scale_E, config)
        if config.selection_bias and bias is None:
            raise ValueError("this router chooses with a selection bias, and none is given")
        tokens, experts = logits_TE.shape
        if experts != config.num_experts:
            raise ValueError(f"a router of {config.num_experts} experts has {experts} logits")
        shape = (tokens, config.top_k)
        weights_TK = torch.empty(shape, dtype=torch.float32, device=logits_TE.device)
        ids_TK = torch.empty(shape, dtype=torch.int64, device=logits_TE.device)
        if tokens:
            logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
            _launch(logits, config, bias, scale, weights_TK, ids_TK)
        if tally is not None:
            _count(tally, logits_TE, ids_TK, config)
        return weights_TK, ids_TK

    def within_capacity(
        self,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        num_experts: int,
        capacity: int,
        plan: StatePlan,
    ) -> Tensor:
        if weights_TK.dtype != torch.float32 or trained([weights_TK]):
            return super().within_capacity(weights_TK, expert_ids_TK, num_experts, capacity, plan)
        planned = own(plan, TritonStatePlan)
        if weights_TK.shape != expert_ids_TK.shape:
            raise ValueError(
                f"weights of choices are {tuple(weights_TK.shape)}, and their experts "
                f"{tuple(expert_ids_TK.shape)}"
            )
        out = torch.zeros(weights_TK.shape, dtype=torch.float32, device=weights_TK.device)
        if out.numel():
            kernels.within_capacity[(len(planned.starts), num_experts)](
                weights_TK.contiguous(),
                expert_ids_TK.contiguous(),
                planned.starts,
                planned.stops,
                out,
                weights_TK.shape[1],
                capacity,
                BLOCK=_LOOKED_AT,
            )
        return out


def _count(tally: RouterTally, logits_TE: Tensor, ids_TK: Tensor, config: RouterConfig) -> None:
    """Add a step's choices to a layer's tally."""
    tokens, experts = logits_TE.shape
    if not tokens:
        return
    logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    nats_T = torch.empty(tokens, dtype=torch.float64, device=logits.device)
    kernels.tally[(tokens,)](
        logits,
        logits.stride(0),
        ids_TK,
        tally.pairs_E,
        nats_T,
        experts,
        config.logit_softcap or 0.0,
        SIGMOID=config.score == "sigmoid",
        CAPPED=config.logit_softcap is not None,
        TOP=config.top_k,
        TOP_PADDED=triton.next_power_of_2(config.top_k),
        EXPERTS=triton.next_power_of_2(experts),
    )
    kernels.tally_sums[(1,)](nats_T, tally.sums, tokens, BLOCK=_LOOKED_AT)


def _of_experts(what: str, x: Tensor | None, config: RouterConfig) -> Tensor | None:
    """x, one number an expert, as the kernel reads it."""
    if x is None:
        return None
    if x.shape != (config.num_experts,):
        raise ValueError(f"{what} of {config.num_experts} experts has the shape {tuple(x.shape)}")
    return x.contiguous()


def _launch(
    logits_TE: Tensor,
    config: RouterConfig,
    bias_E: Tensor | None,
    scale_E: Tensor | None,
    weights_TK: Tensor,
    ids_TK: Tensor,
) -> None:
    # What is not there is not read either.
    nothing = logits_TE
    biased = config.selection_bias and bias_E is not None
    size = config.num_experts // config.num_groups
    padded = triton.next_power_of_2(size)
    groups = triton.next_power_of_2(config.num_groups)
    kernels.route[(len(logits_TE),)](
        logits_TE,
        logits_TE.stride(0),
        bias_E if biased else nothing,
        nothing if scale_E is None else scale_E,
        weights_TK,
        ids_TK,
        config.num_groups,
        size,
        config.logit_softcap or 0.0,
        config.renorm_eps,
        config.renorm_least,
        config.scale,
        SCORE=config.score,
        WEIGHT=config.weight,
        CAPPED=config.logit_softcap is not None,
        BIASED=biased,
        SCALED=scale_E is not None,
        KEPT=config.groups_kept,
        TOP2=config.group_score == "top2" and size > 1,
        MASKED=config.masked_score,
        TOP=config.top_k,
        TOP_PADDED=triton.next_power_of_2(config.top_k),
        GROUPS=groups,
        SIZE=padded,
        num_warps=1 if groups * padded <= 256 else 4,
    )
