"""Frozen configuration records. Checked when constructed, never changed afterwards.

`ModelConfig` is an architecture as data: every supported `model_type` translates its config.json into one.
`EngineConfig` and `ServerSettings` are what an operator chooses; the first's fields carry vLLM's names where the
meaning is the same.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from moebius.errors import ConfigError, UsageError

Score = Literal["softmax", "sigmoid", "logits"]
Weight = Literal["raw", "renorm", "softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]
GroupFill = Literal["zero", "never"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QKNorm = Literal["none", "head", "full"]
UnknownFields = Literal["refuse", "warn"]


def require_word(name: str, value: Any, words: Any) -> None:
    """ConfigError where a value is none of the words of a Literal, as `words`."""
    known = get_args(words)
    require(value in known, f"{name} is {value!r}; it must be one of {', '.join(known)}")


def require(condition: bool, message: str, error: type[UsageError] = ConfigError) -> None:
    """Raise an error with the message unless the condition holds."""
    if not condition:
        raise error(message)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How a token chooses its experts; one function over this record serves every architecture.

    score            what is compared in the top-k: softmax or sigmoid of the logits, or the logits themselves
    weight           what an expert's output is multiplied by: the `raw` score, scores divided by their sum over the
                     chosen (`renorm`), or `softmax` / `sigmoid` of the chosen logits
    selection_bias   a learned vector is added to the scores for the choice only (DeepSeek-V3)
    num_groups, groups_kept, group_score   node-limited routing: keep the best groups, by the `max` or by the sum of
                     the top two (`top2`) of their scores. `group_fill` says what the others' scores become: `zero`,
                     or `never`, minus infinity, so that none of them is chosen
    renorm_eps       added to the divisor of `renorm`
    scale            multiplies the final weights
    logit_bias       the router's linear layer has a bias
    logit_softcap    c * tanh(logits / c), where given
    learned_noise    in training, normal noise as wide as softplus of a second linear layer is added to the logits
                     (noisy top-k, Shazeer et al., arXiv 1701.06538 eq 4)
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
        words_of = {"score": Score, "weight": Weight, "group_score": GroupScore, "group_fill": GroupFill}
        for name, words in words_of.items():
            require_word(f"the router's {name}", getattr(self, name), words)
        cap = self.logit_softcap
        require(cap is None or cap > 0, f"the router's logit_softcap is {cap}; it must be positive")
        require(self.num_experts >= 1, f"num_experts is {self.num_experts}; it must be at least 1")
        require(
            1 <= self.top_k <= self.num_experts,
            f"top_k (num_experts_per_tok) is {self.top_k}; it must lie between 1 and num_experts = {self.num_experts}",
        )
        require(
            self.num_experts % self.num_groups == 0 and 1 <= self.groups_kept <= self.num_groups,
            f"{self.groups_kept} of {self.num_groups} expert groups do not divide {self.num_experts} experts",
        )
        require(
            self.top_k <= self.num_experts // self.num_groups * self.groups_kept,
            f"top_k = {self.top_k} experts cannot come from {self.groups_kept} of {self.num_groups} groups",
        )

    @property
    def masked_score(self) -> float:
        """What the score of an expert becomes whose group is not kept."""
        return 0.0 if self.group_fill == "zero" else -math.inf


@dataclass(frozen=True, slots=True)
class TrainingRouting:
    """What is done to a routing in training only. A model is served without any of it: a token's answer must not
    depend on the tokens beside it, which is what a capacity makes it do.

    dropless          no capacity: every expert takes whatever comes
    capacity_factor   an expert takes capacity_factor * K / E of a micro-batch's tokens, at least min_capacity. GShard
                      counts so; Mesh and ST-MoE leave out K (their 1.25 at top-2 is 0.625 here)
    eval_capacity_factor   the same for measuring held-out text, beside measuring it dropless
    second_policy     of a token's choices after the first: `all` stay, those whose share of the token's weights exceeds
                      second_threshold (`threshold`), or each with probability share / second_threshold (`random`;
                      GShard's threshold is 0.5, ST-MoE's 0.2, arXiv 2202.08906 appendix G)
    jitter            eps: the router's input is multiplied by uniform(1 - eps, 1 + eps), as Mesh TensorFlow does
    """

    dropless: bool = True
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    second_policy: Literal["all", "threshold", "random"] = "all"
    second_threshold: float = 0.2
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"routing.{name} is {value}; it must be positive")
            require(
                value is None or not self.dropless,
                f"routing.{name} is {value}, but a dropless router has no capacity; set routing.dropless = false",
            )
        require(self.dropless or self.capacity_factor is not None, "routing.dropless is false; give capacity_factor")
        require(self.min_capacity >= 0, f"routing.min_capacity is {self.min_capacity}; it must not be negative")
        require(0 < self.second_threshold < 1, f"routing.second_threshold is {self.second_threshold}; use 0 < it < 1")
        require(0 <= self.jitter < 1, f"routing.jitter is {self.jitter}; it must be at least 0 and less than 1")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and a length-independent scaling (arXiv 2104.09864; yarn 2309.00071).

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
        require(self.theta > 0 and math.isfinite(self.theta), f"rope_theta is {self.theta}; it must be positive")
        require(self.factor >= 1.0, f"the rope scaling factor is {self.factor}; it must be at least 1")

    @property
    def stretches(self) -> bool:
        """Whether positions up to original_max_position * factor are what the scaling is for."""
        return self.scaling in ("linear", "yarn")


@dataclass(frozen=True, slots=True)
class FeedForwardConfig:
    """One layer's feed-forward part: `router` None means dense, which is the case of one expert.

    width is an expert's hidden size F; shared_width the always-on expert's (0: none), gated by sigmoid(w·x) when
    shared_gate is set (Qwen2-MoE). An expert that is not gated has two matrices: down(act(gate x)).
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
        require(shared, "a shared expert (shared_width) stands beside those of a router; this feed-forward has none")
        require(bool(self.shared_width) or not self.shared_gate, "shared_gate gates a shared expert; give shared_width")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer as data.

    Sizes: hidden_size D, num_heads H, num_kv_heads G, head_dim N, vocab_size V (width of the logits).
    windows[i] is layer i's sliding window in tokens (a token sees itself and window - 1 before it), None for full.
    feed_forward[i] is layer i's feed-forward part.
    unpublished says what no published model_type has, so that the model can be trained and measured, but not served.
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
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_attention_heads = {self.num_heads} is no multiple of num_key_value_heads = {self.num_kv_heads}",
        )
        require_word("qk_norm", self.qk_norm, QKNorm)
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        require(
            len(self.feed_forward) == self.num_layers == len(self.windows),
            "feed_forward and windows need one entry a layer",
        )

    @property
    def context(self) -> int:
        """Longest sequence, in tokens, that positions were made for.

        yarn and linear stretch the original context by their factor, and a config.json states that context before or
        after it: the model cards of Qwen and of vicuna add the scaling and leave max_position_embeddings alone, others
        raise it. llama3's max_position_embeddings is always what it was raised to; its factor is a frequency's.
        """
        rope, stated = self.rope, self.max_position_embeddings
        return max(stated, int(rope.original_max_position * rope.factor)) if rope.stretches else stated

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


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an operator chooses; None means: derived from the model and from the memory that is there."""

    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        "Of weights and KV cache: auto (the checkpoint's; float16 becomes float32 on a CPU), bfloat16 or float32.",
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto (cuda when torch has it), cpu or cuda."] = "auto"
    max_model_len: Annotated[int | None, "Longest sequence, prompt and output together, in tokens."] = None
    max_num_seqs: Annotated[int, "Most sequences in one step."] = 64
    max_num_batched_tokens: Annotated[int, "Token budget of one step."] = 2048
    block_size: Annotated[int, "Tokens in one block of the KV cache."] = 16
    kv_cache_memory_bytes: Annotated[int | None, "What the KV cache reserves; default: see `moebius plan`."] = None
    enable_prefix_caching: Annotated[bool, "Share blocks between requests with a common prefix."] = True
    enable_chunked_prefill: Annotated[bool, "Compute long prompts in pieces beside running decodes."] = True
    max_queue_requests: Annotated[int, "Most requests that wait."] = 1024
    max_queue_tokens: Annotated[int, "Most tokens that wait."] = 4_194_304
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"], "fcfs: in order of arrival. priority: requests may bring one; lower goes first."
    ] = "fcfs"
    step_deadline: Annotated[float, "Seconds after which a step without progress is a failure."] = 120.0
    threads: Annotated[int | None, "Compute threads; default: one a core, as far as a CPU quota goes."] = None
    trace: Annotated[str | None, "File that every scheduling decision is written to, as JSON lines."] = None

    def __post_init__(self) -> None:
        require(
            self.dtype in ("auto", "bfloat16", "float32"), f"dtype is {self.dtype!r}; use auto, bfloat16 or float32"
        )
        require(self.device in ("auto", "cpu", "cuda"), f"device is {self.device!r}; use auto, cpu or cuda")
        policy = self.scheduling_policy
        require(policy in ("fcfs", "priority"), f"scheduling_policy is {policy!r}; use fcfs or priority")
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens = {self.max_num_batched_tokens} is less than max_num_seqs = {self.max_num_seqs}; "
            "each running sequence needs at least one token a step",
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool):
                require(value >= 1, f"{field.name} is {value}; it must be at least 1")
        require(self.block_size <= 1024, f"block_size is {self.block_size}; it must be at most 1024")
        require_seconds("step_deadline", self.step_deadline)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What an operator chooses about the front door. Times are in seconds.

    served_model_names    names that clients may call the model by; the first is what responses carry
    api_keys              any of these opens every route; none: the server is open
    metrics_api_key       opens /metrics and nothing else; where there is one, no other key opens that
    vllm_metric_names     export the metrics under vLLM's names too
    keep_alive            silence in a stream after which a comment line is sent
    drain_timeout         how long in-flight work may take after SIGTERM
    request_timeout       a request's deadline, from its arrival; its own timeout may be shorter
    body_timeout          how long a client may take to send its body
    stream_buffer_bytes   output that may wait for a reader that lags, before the reader is cut off
    max_connections       connections at once: beyond, those that rest the longest are closed, and then none is taken
    keep_alive_timeout    how long a connection may rest between two requests, in whole seconds
    cors_origins          web pages from these origins may call the server from a browser; `*`: from any
    unknown_fields        of a request's body: refuse it, or ignore them and name them in its log line, a warning
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    metrics_api_key: str | None = None
    vllm_metric_names: bool = True
    keep_alive: float = 15.0
    drain_timeout: float = 30.0
    request_timeout: float = 3600.0
    body_timeout: float = 30.0
    stream_buffer_bytes: int = 128 * 1024
    max_connections: int = 2048
    keep_alive_timeout: int = 75
    cors_origins: tuple[str, ...] = ()
    unknown_fields: UnknownFields = "refuse"

    def __post_init__(self) -> None:
        named = bool(self.served_model_names) and all(self.served_model_names)
        require(named, "served_model_name is empty; give the model at least one name")
        for key in self.api_keys if self.metrics_api_key is None else (*self.api_keys, self.metrics_api_key):
            good = key.isascii() and key.isprintable() and key != "" and " " not in key
            require(good, "an API key must be printable ASCII without spaces, at least one character")
        require_word("unknown_fields", self.unknown_fields, UnknownFields)
        for name in ("keep_alive", "drain_timeout", "request_timeout", "body_timeout"):
            require_seconds(name, getattr(self, name))
        size = self.stream_buffer_bytes
        require(size >= 1024, f"stream_buffer_bytes is {size}; it must be at least 1024")
        most = self.max_connections
        require(most >= 1, f"max_connections is {most}; it must be at least 1")
        rest = self.keep_alive_timeout
        require(1 <= rest <= 86_400, f"keep_alive_timeout is {rest}; it must lie between 1 second and a day (86400)")
        for origin in self.cors_origins:
            _check_origin(origin)


def _check_origin(origin: str) -> None:
    """ConfigError unless this is how a browser names an origin: a wrong one would match none, and nobody would hear."""
    if origin in ("*", "null"):
        return
    match = re.fullmatch(r"(\w[\w+.-]*)://[^\s/?#@*]+", origin)
    example = "write scheme://host[:port] as browsers do, such as https://chat.example.com"
    require(match is not None and origin.isascii(), f"cors_origin is {origin!r}; {example}, or '*' for any")
    require(origin == origin.lower(), f"cors_origin is {origin!r}; browsers write it {origin.lower()!r}")
    for scheme, port in (("http", ":80"), ("https", ":443")):
        usual = origin.startswith(f"{scheme}:") and origin.endswith(port)
        require(not usual, f"cors_origin is {origin!r}; browsers leave out a scheme's own port, {port}")


def host_and_port(host: str, port: int) -> str:
    """An address as URLs write it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class InspectConfig:
    """How much text `moebius inspect` runs, in which pieces, and for which settings it works out costs."""

    max_tokens: Annotated[int, "Run at most so many tokens, chosen evenly from the text."] = 200_000
    row_length: Annotated[int, "Tokens that see each other: the context's length."] = 512
    step_tokens: Annotated[int, "Tokens in one step, over which a step's balance is taken."] = 2048
    capacity_factor: Annotated[Sequence[float], "Capacity factors whose dropped share to work out."] = (1, 1.25, 1.5, 2)
    ranks: Annotated[Sequence[int], "Numbers of ranks to place the experts on; default: 2, 4, ..."] = ()
    threads: Annotated[int | None, "Compute threads; default: one a core, as far as a CPU quota goes."] = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "row_length", "step_tokens"):
            require(getattr(self, name) >= 2, f"{name} is {getattr(self, name)}; it must be at least 2")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; it must be at least 1")
        good = all(0 < factor < math.inf for factor in self.capacity_factor)
        require(good, f"capacity_factor is {list(self.capacity_factor)}; each must be a positive number")

    def ranks_for(self, experts: int) -> list[int]:
        """The numbers of ranks: as given, or powers of two that divide the experts and leave each rank two of them."""
        wrong = [count for count in self.ranks if not 2 <= count <= experts]
        require(not wrong, f"ranks is {wrong}; {experts} experts can be spread over 2 to {experts} ranks")
        return sorted(set(self.ranks)) or [2**i for i in range(1, 7) if 2 ** (i + 1) <= experts and experts % 2**i == 0]


def require_seconds(name: str, value: float) -> None:
    """ConfigError where an option is no positive, finite time."""
    require(0 < value < math.inf, f"{name} is {value}; it must be a positive number of seconds")


def package_table(name: str) -> dict[str, Any]:
    """A TOML file of this package: tables that are data, kept beside the code that reads them."""
    return tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def read_text(path: Path) -> str:
    """A file's text, without the byte order mark that Windows' editors put before it. Raises OSError, or
    UnicodeDecodeError for what is no UTF-8."""
    return path.read_text(encoding="utf-8-sig")


def read_json(
    path: Path, *, default: dict[str, Any] | None = None, error: type[UsageError] = ConfigError
) -> dict[str, Any]:
    """The JSON object in a file; `default`, where given, if there is no file. Raises `error` naming what is wrong."""
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        if default is None:
            raise error(f"{path} does not exist") from None
        return default
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}; it must be a JSON object")
    return found


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON that every parser reads. It has no infinity and no NaN: null stands for a number that is either."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
