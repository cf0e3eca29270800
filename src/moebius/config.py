"""An architecture as data: every supported `model_type` translates its config.json into one.

The records are frozen, and checked when they are constructed.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moebius.errors import require, require_word

Score = Literal["softmax", "sigmoid", "logits"]
Weight = Literal["raw", "renorm", "softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]
GroupFill = Literal["zero", "never"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How a token chooses its experts; one function over this record serves every architecture.

    score            what is compared in the top-k: softmax or sigmoid of the logits, or the logits
                     themselves
    weight           what an expert's output is multiplied by: the `raw` score, scores divided by
                     their sum over the chosen (`renorm`), or `softmax` / `sigmoid` of the chosen
                     logits
    selection_bias   a learned vector is added to the scores for the choice only (DeepSeek-V3)
    num_groups, groups_kept, group_score   node-limited routing: keep the best groups, by the `max`
                                           or by the sum of
                     the top two (`top2`) of their scores. `group_fill` says what the others' scores
                     become: `zero`, or `never`, minus infinity, so that none of them is chosen
    renorm_eps       added to the divisor of `renorm`
    scale            multiplies the final weights
    logit_bias       the router's linear layer has a bias
    logit_softcap    c * tanh(logits / c), where given
    learned_noise    in training, normal noise as wide as softplus of a second linear layer is added
                     to the logits (noisy top-k, Shazeer et al., arXiv 1701.06538 eq 4)
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    weight: Weight = "raw"
    selection_bias: bool = False
    num_groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "max"
    group_fill: GroupFill = "zero"
    renorm_eps: float = 0.0
    scale: float = 1.0
    logit_bias: bool = False
    logit_softcap: float | None = None
    learned_noise: bool = False

    def __post_init__(self) -> None:
        words_of = {
            "score": Score,
            "weight": Weight,
            "group_score": GroupScore,
            "group_fill": GroupFill,
        }
        for name, words in words_of.items():
            require_word(f"the router's {name}", getattr(self, name), words)
        cap = self.logit_softcap
        require(cap is None or cap > 0, f"the router's logit_softcap is {cap}; it must be positive")
        require(self.num_experts >= 1, f"num_experts is {self.num_experts}; it must be at least 1")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k (num_experts_per_tok) is {self.top_k}; it must lie between 1 and num_experts = "
            f"{self.num_experts}",
        )
        require(
            self.num_experts % self.num_groups == 0 and 1 <= self.groups_kept <= self.num_groups,
            f"{self.groups_kept} of {self.num_groups} expert groups do not divide "
            f"{self.num_experts} experts",
        )
        require(
            self.top_k <= self.num_experts // self.num_groups * self.groups_kept,
            f"top_k = {self.top_k} experts cannot come from {self.groups_kept} of "
            f"{self.num_groups} groups",
        )

    @property
    def masked_score(self) -> float:
        """What the score of an expert becomes whose group is not kept."""
        return 0.0 if self.group_fill == "zero" else -math.inf


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and a length-independent scaling (arXiv 2104.09864;
    yarn 2309.00071).

    original_max_position is the context before scaling, in tokens.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(
            self.theta > 0 and math.isfinite(self.theta),
            f"rope_theta is {self.theta}; it must be positive",
        )
        require(
            self.factor >= 1.0, f"the rope scaling factor is {self.factor}; it must be at least 1"
        )

    @property
    def stretches(self) -> bool:
        """Whether positions up to original_max_position * factor are what the scaling is for."""
        return self.scaling in ("linear", "yarn")


@dataclass(frozen=True, slots=True)
class FeedForwardConfig:
    """One layer's feed-forward part: `router` None means dense, which is the case of one expert.

    width is an expert's hidden size F; shared_width the always-on expert's (0: none), gated by
    sigmoid(w·x) when shared_gate is set (Qwen2-MoE). An expert that is not gated has two matrices:
    down(act(gate x)).
    """

    width: int
    router: RouterConfig | None = None
    activation: Activation = "silu"
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        require(self.width >= 1, f"the feed-forward width is {self.width}; it must be at least 1")
        require_word("the feed-forward's activation", self.activation, Activation)
        shared = self.router is not None or not self.shared_width
        require(
            shared,
            "a shared expert (shared_width) stands beside those of a router; this feed-forward has "
            "none",
        )
        require(
            bool(self.shared_width) or not self.shared_gate,
            "shared_gate gates a shared expert; give shared_width",
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer as data.

    Sizes: hidden_size D, num_heads H, num_kv_heads G, head_dim N, vocab_size V (width of the
    logits). windows[i] is layer i's sliding window in tokens (a token sees itself and window - 1
    before it), None for full. feed_forward[i] is layer i's feed-forward part.
    unpublished says what no published model_type has, so that the model can be trained and
    measured, but not served.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope: RopeConfig
    feed_forward: tuple[FeedForwardConfig, ...]
    windows: tuple[int | None, ...]
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    attention_scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    unpublished: str = ""

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        ):
            require(
                getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1"
            )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_attention_heads = {self.num_heads} is no multiple of num_key_value_heads = "
            f"{self.num_kv_heads}",
        )
        require_word("qk_norm", self.qk_norm, QKNorm)
        require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; rotary embedding needs an even one",
        )
        require(
            len(self.feed_forward) == self.num_layers == len(self.windows),
            "feed_forward and windows need one entry a layer",
        )

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, that positions were made for.

        yarn and linear stretch the original context by their factor, and a config.json states that
        context before or after it: the model cards of Qwen and of vicuna add the scaling and leave
        max_position_embeddings alone, others raise it. llama3's max_position_embeddings is always
        what it was raised to; its factor is a frequency's.
        """
        rope, stated = self.rope, self.max_position_embeddings
        return (
            max(stated, int(rope.original_max_position * rope.factor)) if rope.stretches else stated
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
