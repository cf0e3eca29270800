"""Each row of the published routers is a RouterConfig: compared with transformers' own block for
that architecture."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.moe.router import Router
from moebius.ops import select_ops
from moebius.ops.config import RouterConfig

D, E, K, T = 12, 16, 4, 64
SIZES: dict[str, Any] = {
    "hidden_size": D, "num_experts": E, "num_local_experts": E, "num_experts_per_tok": K, "norm_topk_prob": True,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "topk_method": "group_limited_greedy",
    "moe_norm_min": 1e-12, "moe_topk": K, "use_expert_bias": True, "rms_norm_eps": 1e-6, "expert_capacity": T,
    "router_bias": False, "router_jitter_noise": 0.0, "router_ignore_padding_tokens": False, "router_dtype": "float32",
    "n_routed_experts": E, "moe_num_experts": E, "moe_k": K, "hidden_dim": D, "router_scaling_factor": 2.5,
    "moe_router_logit_softcapping": 0.7,
}  # fmt: skip
V3 = RouterConfig(
    E, K, "sigmoid", "renorm", selection_bias=True, num_groups=4, groups_kept=2, group_score="top2",
    group_fill="never", renorm_eps=1e-20, scale=2.5,
)  # fmt: skip
SOFTMAX = RouterConfig(E, K)
RENORM = replace(SOFTMAX, weight="renorm")
BIASED = replace(RENORM, score="sigmoid", selection_bias=True)
CHOSEN_LOGITS = replace(SOFTMAX, score="logits", weight="softmax")

# architecture, router class, what it is as data, what its configuration says differently
ROWS: list[tuple[str, str, RouterConfig, dict[str, Any]]] = [
    ("mixtral", "MixtralTopKRouter", RENORM, {}),
    ("qwen2_moe", "Qwen2MoeTopKRouter", SOFTMAX, {"norm_topk_prob": False}),
    ("qwen3_moe", "Qwen3MoeTopKRouter", RENORM, {}),
    ("qwen3_next", "Qwen3NextTopKRouter", RENORM, {}),
    ("olmoe", "OlmoeTopKRouter", SOFTMAX, {"norm_topk_prob": False}),
    ("flex_olmo", "FlexOlmoTopKRouter", SOFTMAX, {"norm_topk_prob": False}),
    ("deepseek_v2", "DeepseekV2TopkRouter", replace(SOFTMAX, num_groups=4, groups_kept=2, scale=16.0),
     {"routed_scaling_factor": 16.0}),
    ("deepseek_v2", "DeepseekV2TopkRouter", SOFTMAX, {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
    ("deepseek_v3", "DeepseekV3TopkRouter", V3, {}),
    ("deepseek_v3", "DeepseekV3TopkRouter", replace(V3, num_groups=1, groups_kept=1), {"n_group": 1, "topk_group": 1}),
    ("glm4_moe", "Glm4MoeTopkRouter", replace(V3, num_groups=1, groups_kept=1), {"n_group": 1, "topk_group": 1}),
    ("dots1", "Dots1TopkRouter", replace(V3, num_groups=1, groups_kept=1), {"n_group": 1, "topk_group": 1}),
    ("gpt_oss", "GptOssTopKRouter", replace(CHOSEN_LOGITS, logit_bias=True), {}),
    ("granitemoe", "GraniteMoeTopKRouter", CHOSEN_LOGITS, {}),
    ("jamba", "JambaTopKRouter", SOFTMAX, {}),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", replace(RENORM, selection_bias=True, renorm_least=1e-12), {}),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", replace(RENORM, selection_bias=True, renorm_least=0.4),
     {"moe_norm_min": 0.4}),
    ("minimax", "MiniMaxTopKRouter", RENORM, {}),
    ("minimax_m2", "MiniMaxM2TopKRouter", replace(RENORM, score="sigmoid", selection_bias=True), {}),
    ("hunyuan_v1_moe", "HunYuanMoEV1Gate", RENORM, {}),
    ("mellum", "MellumTopKRouter", RENORM, {}),
    ("exaone_moe", "ExaoneMoeTopkRouter", V3, {}),
    ("solar_open", "SolarOpenTopkRouter", V3, {}),
    ("hy_v3", "HYV3TopKRouter", replace(BIASED, renorm_eps=1e-20, scale=2.5), {}),
    ("laguna", "LagunaTopKRouter", replace(BIASED, logit_softcap=0.7), {}),
    ("cohere2_moe", "Cohere2MoeTopKRouter", CHOSEN_LOGITS, {"expert_selection_fn": "softmax"}),
    ("cohere2_moe", "Cohere2MoeTopKRouter", replace(RENORM, score="sigmoid"), {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", "Cohere2MoeTopKRouter", replace(RENORM, score="sigmoid", weight="raw"),
     {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("lfm2_moe", "Lfm2MoeTopKRouter", replace(RENORM, score="sigmoid", selection_bias=True, renorm_eps=1e-6),
     {"routed_scaling_factor": 1.0}),
    ("llama4", "Llama4Router", RouterConfig(E, 1, "logits", "sigmoid"), {"num_experts_per_tok": 1}),
]  # fmt: skip


def dense(weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """(T, E): a token's weight for each expert, NaN for those it is not sent to."""
    return torch.full((weights_TK.shape[0], E), float("nan")).scatter(
        1, expert_ids_TK, weights_TK.float()
    )


def theirs(
    architecture: str, name: str, changes: dict[str, Any], x_TD: Tensor
) -> tuple[Tensor, Any, Tensor]:
    """transformers' dense weights, its router and its selection bias, with random parameters."""
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    router = getattr(module, name)(SimpleNamespace(**{**SIZES, **changes}))
    bias_E = 0.3 * torch.randn(E)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(0.4 * torch.randn_like(tensor))
        for buffer_name, tensor in (*router.named_buffers(), *router.named_parameters()):
            if "correction_bias" in buffer_name:
                tensor.copy_(bias_E.view_as(tensor))
    extra = (bias_E,) if architecture in ("minimax_m2", "lfm2_moe", "hy_v3") else ()
    out = router(x_TD, *extra)
    if architecture == "llama4":
        ids = out[0].argmax(-1, keepdim=True)
        return dense(out[0].gather(1, ids), ids), router, bias_E
    _, weights, ids = out
    return dense(weights, ids), router, bias_E


@pytest.mark.parametrize(
    ("architecture", "name", "config", "changes"),
    ROWS,
    ids=[f"{r[0]}-{i}" for i, r in enumerate(ROWS)],
)
def test_row_equals_transformers(
    architecture: str, name: str, config: RouterConfig, changes: dict[str, Any]
) -> None:
    torch.manual_seed(len(name))
    x_TD = torch.randn(T, D)
    with torch.no_grad():
        expected, router, bias_E = theirs(architecture, name, changes, x_TD)
        ours = Router(select_ops("cpu", torch.float32), config, D, torch.float32)
        linear = getattr(router, "wg", router)
        ours.weight.copy_(linear.weight)
        if ours.bias is not None:
            ours.bias.copy_(router.bias)
        if ours.selection_bias is not None:
            ours.selection_bias.copy_(bias_E)
        routing = ours(x_TD)
    torch.testing.assert_close(dense(*routing[:2]), expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert (
        routing.weights_TK[:, :-1] >= routing.weights_TK[:, 1:]
    ).all() or config.selection_bias, "best first"


def test_switch_top1() -> None:
    """Switch keeps the raw probability of its one expert."""
    module = importlib.import_module(
        "transformers.models.switch_transformers.modeling_switch_transformers"
    )
    router = module.SwitchTransformersTop1Router(SimpleNamespace(**SIZES))
    ours = Router(select_ops("cpu", torch.float32), RouterConfig(E, 1), D, torch.float32)
    x_TD = torch.randn(T, D)
    with torch.no_grad():
        ours.weight.copy_(router.classifier.weight)
        one_hot, probability, _ = router(x_TD.unsqueeze(0))
        routing = ours(x_TD)
    assert torch.equal(routing.expert_ids_TK.squeeze(1), one_hot[0].argmax(-1))
    torch.testing.assert_close(routing.weights_TK, probability[0])


WRONG = [
    replace(V3, group_score="max"),
    replace(V3, scale=1.0),
    replace(V3, weight="raw"),
    replace(V3, selection_bias=False),
    replace(V3, groups_kept=3),
    replace(V3, score="softmax"),
]


@pytest.mark.parametrize("config", WRONG, ids=range(len(WRONG)))
def test_a_wrong_choice_is_seen(config: RouterConfig) -> None:
    """The comparison above fails for each knob turned wrongly."""
    torch.manual_seed(0)
    x_TD, weight_ED, bias_E = torch.randn(T, D), torch.randn(E, D), torch.randn(E)
    ops = select_ops("cpu", torch.float32)
    right = dense(*ops.route(x_TD @ weight_ED.T, V3, bias_E))
    wrong = dense(*ops.route(x_TD @ weight_ED.T, config, bias_E))
    assert not torch.allclose(right, wrong, equal_nan=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "logits"])
def test_ties_go_to_the_lowest_index(score: Any) -> None:
    config = RouterConfig(8, 3, score, "softmax" if score == "logits" else "raw")
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 8, [-0.0, 0.0] * 4])
    _, ids = select_ops("cpu", torch.float32).route(logits, config)
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]


def test_soft_cap_hand_worked() -> None:
    """30 tanh(60/30) = 28.921, 30 tanh(0) = 0: a two-way softmax of their difference."""
    config = RouterConfig(2, 1, logit_softcap=30.0)
    weights, ids = select_ops("cpu", torch.float32).route(torch.tensor([[0.0, 60.0]]), config)
    assert ids.item() == 1 and weights.item() == pytest.approx(1.0, abs=1e-9)
    weights, _ = select_ops("cpu", torch.float32).route(
        torch.tensor([[0.0, 3.0]]), replace(config, logit_softcap=1.0)
    )
    assert weights.item() == pytest.approx(1 / (1 + 2.718281828**-0.995054754), rel=1e-6)


def test_router_runs_in_float32() -> None:
    """ST-MoE footnote 7: beside ten logits of 128, one of 128.5 has probability .142, rounded to
    bfloat16 .091."""
    logits = torch.tensor([[128.0] * 10 + [128.5]])
    assert torch.softmax(logits.bfloat16().float(), -1)[0, -1].item() == pytest.approx(
        0.0909, abs=1e-3
    )
    router = Router(select_ops("cpu", torch.bfloat16), RouterConfig(11, 1), 2, torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0]] * 10 + [[1.0, 1.0]]))
        routing = router(torch.tensor([[128.0, 0.5]], dtype=torch.bfloat16))
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert (
        routing.weights_TK.item() == pytest.approx(0.1415, abs=1e-3)
        and routing.expert_ids_TK.item() == 10
    )


def test_impossible_routers_are_refused() -> None:
    for bad in (
        {"top_k": 9},
        {"top_k": 0},
        {"num_groups": 3},
        {"num_groups": 4, "groups_kept": 1, "top_k": 3},
    ):
        with pytest.raises(ConfigError):
            RouterConfig(**{"num_experts": 8, "top_k": 2, **bad})
