"""What operations are configured with: how a router chooses, nonlinearities, sizes of heads."""

import math
from dataclasses import dataclass
from typing import Literal

from moebius.errors import ConfigError, require_word

Score = Literal["softmax", "sigmoid", "logits"]
Weight = Literal["raw", "renorm", "softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]
GroupFill = Literal["zero", "never"]
ActivationWord = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]
# What the gates of a recurrent layer's output, or of attention's heads, go through.
GateFunction = Literal["silu", "sigmoid", "softplus", "identity"]
# What activations become where they meet quantised weights.
Activations = Literal["int8", "float"]


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """The nonlinearity of gpt-oss (arXiv 2508.10925): (u + 1) * g * sigmoid(alpha * g).

    g is what the gate matrix gives, at most `limit`; u what the other gives, between -limit and
    limit.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        for name in ("alpha", "limit"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"the feed-forward's {name} is {value}; it must be positive")


Activation = ActivationWord | ClampedSwiGLU


@dataclass(frozen=True, slots=True)
class DeltaSizes:
    """The heads of a gated delta layer.

    key_heads, value_heads   of the former there may be fewer, each shared by as many value heads
    key_dim, value_dim       sizes K and V of a head
    tiled                    value head h has key head h mod key_heads (GGUF's order of heads);
                             else neighbours share one
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    tiled: bool = False

    def __post_init__(self) -> None:
        for name in ("key_heads", "value_heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} of a gated delta layer is {value}; it must be positive")
        if self.value_heads % self.key_heads:
            raise ConfigError(
                f"{self.value_heads} value heads of a gated delta layer cannot share "
                f"{self.key_heads} key heads"
            )

    @property
    def qkv_size(self) -> int:
        """C: queries, keys and values of a token, side by side."""
        return 2 * self.key_heads * self.key_dim + self.out_size

    @property
    def out_size(self) -> int:
        return self.value_heads * self.value_dim

    def key_head(self, value_head: int) -> int:
        if self.tiled:
            return value_head % self.key_heads
        return value_head // (self.value_heads // self.key_heads)


@dataclass(frozen=True, slots=True)
class ChannelDecay:
    """How fast each channel of a key decays (Kimi delta attention, arXiv 2510.26692), of a number f
    and what is kept for each head, decay = -exp(A_log): decay * softplus(f), or with a bound
    lower * sigmoid(-decay * f).

    lower     None for no bound; else below zero
    rounded   to the dtype of f, before its exponential is taken
    """

    lower: float | None = None
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.lower is not None and not -math.inf < self.lower < 0:
            raise ConfigError(f"decays of channels are bounded by {self.lower}; it must be below 0")


@dataclass(frozen=True, slots=True)
class ScanSizes:
    """The heads of a selective state space (Mamba 2, arXiv 2405.21060).

    heads, head_dim   how many, and the size P of what each reads and gives
    state_dim         size N of a state for each of these P
    groups            of as many heads, which share what writes to states and what reads them
    """

    heads: int
    head_dim: int
    state_dim: int
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "state_dim", "groups"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} of a Mamba layer is {value}; it must be positive")
        if self.heads % self.groups:
            raise ConfigError(f"{self.heads} heads of a Mamba layer are no {self.groups} groups")

    @property
    def out_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def xbc_size(self) -> int:
        """C: x of all heads, and B and C of all groups, side by side."""
        return self.out_size + 2 * self.groups * self.state_dim


@dataclass(frozen=True, slots=True)
class HeadGates:
    """Where the gates of attention's heads lie in a row: head h's begin at start + h * stride.

    single     one gate for all values of a head; else one for each
    function   what they go through
    """

    start: int
    stride: int
    single: bool = False
    function: GateFunction = "sigmoid"

    def __post_init__(self) -> None:
        require_word("the function of heads' gates", self.function, GateFunction)


@dataclass(frozen=True, slots=True)
class Temperature:
    """How queries grow with their position p (Mistral 4): times 1 + beta * ln(1 + p // original).

    original   a number of tokens
    """

    beta: float
    original: int

    def __post_init__(self) -> None:
        if self.original < 1:
            raise ConfigError(
                f"queries grow every {self.original} tokens, by "
                "original_max_position_embeddings; it must be at least 1"
            )


@dataclass(frozen=True, slots=True)
class HeadRows:
    """How a token's row holds attention's heads, and what becomes of them in rotate_and_store.

    gated            behind each query head stand as many gates, which are left alone
    turned_first     queries and keys are rotated, and rounded, before they are normed
    keys_as_values   values are the keys as they were projected, and have no columns (Gemma 4)
    normed_values    values are normed, without a weight (Gemma 4)
    queries_alone    there are no others: keys and values are those of another layer (Gemma 4)
    """

    gated: bool = False
    turned_first: bool = False
    keys_as_values: bool = False
    normed_values: bool = False
    queries_alone: bool = False

    def sizes(self, width: int, kv_heads: int, key_size: int, value_size: int) -> list[int]:
        """Columns of queries (with gates), keys and values in a row of `width`."""
        keys = 0 if self.queries_alone else kv_heads * key_size
        values = 0 if self.queries_alone or self.keys_as_values else kv_heads * value_size
        return [width - keys - values, keys, values]


PLAIN_HEADS = HeadRows()


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
    renorm_least     what that divisor is at least
    scale            multiplies the final weights
    logit_bias       the router's linear layer has a bias
    float32          its weights stay float32 in a model of any dtype (ERNIE, Hunyuan)
    logit_softcap    c * tanh(logits / c), where given
    capacity         of one sequence's tokens, how many an expert takes: the output of those beyond
                     is nothing (arXiv 2101.03961 section 2.2). For an encoder, which reads a
                     sequence as a whole
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
    renorm_least: float = 0.0
    scale: float = 1.0
    logit_bias: bool = False
    float32: bool = False
    logit_softcap: float | None = None
    learned_noise: bool = False
    capacity: int | None = None

    def __post_init__(self) -> None:
        require_word("the router's score", self.score, Score)
        require_word("the router's weight", self.weight, Weight)
        require_word("the router's group_score", self.group_score, GroupScore)
        require_word("the router's group_fill", self.group_fill, GroupFill)
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ConfigError(
                f"the router's logit_softcap is {self.logit_softcap}; it must be positive"
            )
        if self.capacity is not None and self.capacity < 1:
            raise ConfigError(f"expert_capacity is {self.capacity}; it must be at least 1")
        if self.num_experts < 1:
            raise ConfigError(f"num_experts is {self.num_experts}; it must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k (num_experts_per_tok) is {self.top_k}; it must lie between 1 and "
                f"num_experts = {self.num_experts}"
            )
        whole = self.num_experts % self.num_groups == 0
        if not (whole and 1 <= self.groups_kept <= self.num_groups):
            raise ConfigError(
                f"{self.groups_kept} of {self.num_groups} expert groups do not divide "
                f"{self.num_experts} experts"
            )
        if self.top_k > self.num_experts // self.num_groups * self.groups_kept:
            raise ConfigError(
                f"top_k = {self.top_k} experts cannot come from {self.groups_kept} of "
                f"{self.num_groups} groups"
            )

    @property
    def masked_score(self) -> float:
        """What the score of an expert becomes whose group is not kept."""
        return 0.0 if self.group_fill == "zero" else -math.inf
