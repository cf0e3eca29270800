"""What many families spell alike in config.json, as parts of a ModelConfig: attention and its
rotary embedding, feed-forwards, which layers slide, and the whole.

A family takes what it shares with the others from here, and changes the records where it differs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebius.files import package_table, read_json
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.reading import ConfigReader, Keys
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import RopeConfig
from moebius.ops.config import Activation, RouterConfig, Score, Weight

FULL = "full_attention"
SLIDING = "sliding_attention"
LINEAR = "linear_attention"
CONV = "conv"
DENSE = "dense"
SPARSE = "sparse"
_OLD_LAYER_TYPES = {"attention": FULL, "mamba": LINEAR}
"""What transformers 4 called them."""
ROPES = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
"""Keys that say nothing of layers without positions."""
_ROPE_KEYS: Mapping[str, Sequence[str]] = read_json(Path(__file__).with_name("rope_keys.json"))
ACTIVATIONS: Mapping[str, Activation] = package_table("models/keys.toml")["activations"]


def activation(reader: ConfigReader, key: str = "hidden_act") -> Activation:
    name = reader.get(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise reader.error(f"{key} is {name!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def layer_types(
    reader: ConfigReader,
    known: Sequence[str] = (FULL, SLIDING),
    key: str = "layer_types",
    *,
    counted: bool = True,
) -> Sequence[str] | None:
    """One of the known words a layer, None where the key is absent. Not counted, there are as many
    layers as words."""
    value = reader.get(key)
    if value is None:
        return None
    given = value if isinstance(value, list) else []
    types = [_OLD_LAYER_TYPES.get(v, v) if isinstance(v, str) else v for v in given]
    wanted = reader.num_layers if counted else max(len(types), 1)
    if len(types) != wanted or not all(v in known for v in types):
        raise reader.error(f"{key} must name one of {', '.join(known)} for each layer")
    return types


def every_nth_full(layers: int, period: int) -> list[str]:
    """The words of layers, of which the last of each `period` have no window."""
    return [SLIDING if (i + 1) % period else FULL for i in range(layers)]


def sliding_window(reader: ConfigReader) -> int | None:
    """The sliding window of all layers, where it is not null."""
    return None if reader.get("sliding_window") is None else reader.integer("sliding_window")


def rope(reader: ConfigReader, partial: float | None = None) -> RopeConfig:
    """rope_theta and rope_scaling (transformers 4) or rope_parameters (5); rope_scaling wins as it
    does there. `partial` is as in rope_of."""
    old = reader.get("rope_scaling")
    new = reader.get("rope_parameters")
    name = "rope_scaling" if old else "rope_parameters"
    return rope_of(reader, name, old or new, partial)


def given_ropes(reader: ConfigReader, usual: Mapping[str, Any]) -> Any:
    """rope_parameters, which has an object for each kind of layer (transformers 5); null is the
    `usual` one."""
    given = reader.get("rope_parameters")
    return usual if given is None else given


def rope_of(
    reader: ConfigReader, name: str, value: Any, partial: float | None = None
) -> RopeConfig:
    """One object of rope's entries, which stands under `name`; None for an empty one.

    partial: what an absent partial_rotary_factor means to families that turn a part of each head;
    None for the others.
    """
    given = value or {}
    if not isinstance(given, dict):
        raise reader.error(f"{name} is {given!r}; it must be an object")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind in ("dynamic", "longrope", "su"):
        raise reader.error(
            f"rope type {kind!r} is not supported: its frequencies depend on the longest sequence "
            "in the batch, so a request's answer would depend on its neighbours; linear, llama3 "
            "and yarn are supported"
        )
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise reader.error(f"rope type {kind!r} is unknown; {', '.join(_ROPE_KEYS)} are supported")
    where = f"{reader.where}{name} of type {kind}: "
    entries = ConfigReader(given, Keys(dict.fromkeys(_ROPE_KEYS[kind])), where)
    entries.computed |= {"rope_type", "type"}
    nested = [key for key, entry in given.items() if isinstance(entry, Mapping)]
    if nested:
        raise entries.error(
            f"{nested} are objects; all layers of this type have the same frequencies"
        )
    config = _scaled(reader, kind, entries)
    if partial is None:
        _check_partial(reader, entries)
    else:
        key = "partial_rotary_factor"
        config = replace(config, partial=entries.number(key, reader.number(key, partial)))
    entries.finish()
    reader.ignored += [f"{name}.{ignored}" for ignored in entries.ignored]
    return config


def _check_partial(reader: ConfigReader, entries: ConfigReader) -> None:
    """Heads are turned as a whole; not every type of frequencies reads which part of them is to
    be."""
    key = "partial_rotary_factor"
    everywhere = reader.number(key, 1.0)
    if key in entries.keys.read:
        partial = entries.number(key, everywhere)
        if partial != 1.0:
            raise entries.error(f"{key} is {partial}; only 1 is supported")
    elif everywhere != 1.0:
        reader.ignored.append(key)


def _scaled(reader: ConfigReader, kind: str, entries: ConfigReader) -> RopeConfig:
    """The frequencies of one rope type."""
    longest = reader.integer("max_position_embeddings")
    key = "original_max_position_embeddings"
    original = reader.integer(key, entries.integer(key, longest))
    # The object's own counts; files may say it outside as well.
    readers = [each for each in (entries, reader) if each.get("rope_theta") is not None]
    theta = (readers or [reader])[0].number("rope_theta")
    if kind == "linear":
        return RopeConfig(theta, "linear", entries.number("factor"), original)
    if kind == "llama3":
        low = entries.number("low_freq_factor")
        high = entries.number("high_freq_factor")
        if not low < high:
            raise reader.error(
                f"rope low_freq_factor = {low} must be less than high_freq_factor = {high}"
            )
        return RopeConfig(theta, "llama3", entries.number("factor"), original, low, high)
    if kind == "yarn":
        return RopeConfig(
            theta,
            "yarn",
            entries.number("factor", longest / original),
            original,
            beta_fast=entries.number("beta_fast", 32.0) or 32.0,
            beta_slow=entries.number("beta_slow", 1.0) or 1.0,
            attention_factor=entries.optional_number("attention_factor"),
            mscale=entries.optional_number("mscale"),
            mscale_all_dim=entries.optional_number("mscale_all_dim"),
            # Null is false here.
            truncate=entries.flag("truncate", "truncate" not in entries.raw),
        )
    return RopeConfig(theta)


def longrope(reader: ConfigReader, given: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Of sequences up to original_max_position_embeddings, and of longer (arXiv 2402.13753)."""
    factors = ("short_factor", "long_factor")
    keys = ("rope_theta", "partial_rotary_factor", "factor", "attention_factor", *factors)
    entries = ConfigReader(given, Keys(dict.fromkeys(keys)), f"{reader.where}longrope: ")
    entries.computed |= {"rope_type", "type", "original_max_position_embeddings", *keys[:2]}
    plain = {key: given[key] for key in keys[:2] if given.get(key) is not None}
    base = rope_of(reader, "rope_scaling", plain, partial=1.0)
    original = reader.integer("original_max_position_embeddings", low=2)
    longest = reader.integer("max_position_embeddings")
    factor = max(entries.number("factor", longest / original), 1.0)
    usual = math.sqrt(1 + math.log(factor) / math.log(original))
    base = replace(base, attention_factor=entries.number("attention_factor", usual))
    found = []
    for key in factors:
        each = entries.get(key)
        if not (isinstance(each, list) and all(type(x) in (int, float) and x > 0 for x in each)):
            raise entries.error(f"{key} is {each!r}; it must be a list of positive numbers")
        found.append(replace(base, divisors=tuple(map(float, each))))
    entries.finish()
    return found[0], found[1]


def attention(reader: ConfigReader, *, biases: bool = False, **different: Any) -> GQA:
    """Grouped-query attention without a window, and what is `different` about this one: fields of
    GQA. With `biases`, the key attention_bias gives them to all four projections."""
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    if reader.get("head_dim") is None and hidden % heads:
        raise reader.error(
            f"hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; give head_dim"
        )
    if biases:
        both = reader.flag("attention_bias")
        different = {"qkv_bias": both, "output_bias": both} | different
    if "rope" not in different:
        different["rope"] = rope(reader)
    return GQA(
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        head_dim=reader.integer("head_dim", hidden // heads),
        **different,
    )


def turning_windows(reader: ConfigReader, types: Sequence[str], **different: Any) -> list[GQA]:
    """Each layer's attention, where those with a window turn, and those without have no positions
    (NoPE). `different` is as in `attention`."""
    full = attention(reader, rope=None, **different)
    slides = replace(full, rope=rope(reader), window=reader.integer("sliding_window"))
    return [slides if kind == SLIDING else full for kind in types]


def attention_of_kinds(
    reader: ConfigReader,
    types: Sequence[str],
    ropes: Any,
    partial: float | None = None,
    **different: Any,
) -> list[GQA]:
    """Each layer's attention, where `ropes` has an object for each kind of layer. `partial` is as
    in rope_of, `different` as in `attention`."""
    plain = attention(reader, rope=None, **different)
    kinds = {}
    for kind in dict.fromkeys(types):
        given = ropes.get(kind) if isinstance(ropes, dict) else None
        if not isinstance(given, dict):
            raise reader.error(f"rope_parameters has no object for {kind}, which a layer is of")
        turning = rope_of(reader, f"rope_parameters.{kind}", given, partial)
        kinds[kind] = replace(plain, rope=turning)
    if SLIDING in kinds:
        kinds[SLIDING] = replace(kinds[SLIDING], window=reader.integer("sliding_window"))
    # Where no layer has one, it is none's.
    reader.computed.add("sliding_window")
    return [kinds[kind] for kind in types]


def feed_forward(
    reader: ConfigReader, act: str = "hidden_act", **different: Any
) -> FeedForwardConfig:
    """A dense one, whose activation the key `act` says, and what is `different` about it: fields of
    FeedForwardConfig."""
    width = reader.integer("intermediate_size")
    return FeedForwardConfig(width, activation=activation(reader, act), **different)


def experts(
    reader: ConfigReader,
    count: str,
    width: str,
    *,
    weight: Weight | None = None,
    score: Score = "softmax",
    chosen: str = "num_experts_per_tok",
) -> FeedForwardConfig:
    """As many experts, and as wide, as the keys `count` and `width` say, of which a token has as
    many as `chosen` does; weight None is what norm_topk_prob says."""
    weight = weight or ("renorm" if reader.flag("norm_topk_prob") else "raw")
    router = RouterConfig(reader.integer(count), reader.integer(chosen), score=score, weight=weight)
    return FeedForwardConfig(reader.integer(width), router, activation(reader))


def grouped_experts(
    reader: ConfigReader, count: str = "n_routed_experts", shared: str = "n_shared_experts"
) -> FeedForwardConfig:
    """The experts of DeepSeek-V3 (arXiv 2412.19437), all shared ones as a single wide one.

    count, shared: the keys of how many experts there are, and how many shared ones.
    """
    plain = experts(reader, count, "moe_intermediate_size", score="sigmoid")
    assert plain.router is not None
    router = replace(
        plain.router,
        selection_bias=True,
        num_groups=reader.integer("n_group"),
        groups_kept=reader.integer("topk_group"),
        group_score="top2",
        group_fill="never",
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor"),
    )
    return replace(plain, router=router, shared_width=plain.width * reader.integer(shared))


def biased_experts(
    reader: ConfigReader, count: str, width: str, shared: str | None = None, **different: Any
) -> FeedForwardConfig:
    """Experts with sigmoid scores and a selection bias; the scores of the chosen are divided by
    their sum. As many as the key `shared` says are always on. `different`: fields of
    RouterConfig."""
    plain = experts(reader, count, width, score="sigmoid", weight="renorm")
    assert plain.router is not None
    router = replace(plain.router, selection_bias=True, **different)
    always = 0 if shared is None else reader.integer(shared)
    return replace(plain, router=router, shared_width=always * plain.width)


def first_dense(
    reader: ConfigReader, sparse: FeedForwardConfig, first: int
) -> list[FeedForwardConfig]:
    """Each layer's feed-forward part, of which the `first` ones are dense."""
    dense = feed_forward(reader)
    return [dense if i < first else sparse for i in range(reader.num_layers)]


def dense_or_sparse(
    reader: ConfigReader, sparse: FeedForwardConfig, first: int
) -> list[FeedForwardConfig]:
    """The same, unless mlp_layer_types says it of each."""
    types = layer_types(reader, (DENSE, SPARSE), "mlp_layer_types")
    if types is None:
        return first_dense(reader, sparse, first)
    dense = feed_forward(reader)
    return [sparse if kind == SPARSE else dense for kind in types]


def layers(
    reader: ConfigReader,
    mixers: GQA | Sequence[Mixer],
    parts: FeedForwardConfig | Sequence[FeedForwardConfig],
    windows: int | Sequence[int | None] | None = None,
    **different: Any,
) -> tuple[LayerSpec, ...]:
    """A layer's mixer and feed-forward part, one each or one for all, and what is `different` from
    a plain layer: fields of LayerSpec. Attention that is one for all gets the windows, one each or
    one for all."""
    each_mixer = _windowed(reader, mixers, windows) if isinstance(mixers, GQA) else mixers
    each_part = parts if isinstance(parts, Sequence) else [parts] * reader.num_layers
    return tuple(
        LayerSpec(mixer, part, **different)
        for mixer, part in zip(each_mixer, each_part, strict=True)
    )


def _windowed(
    reader: ConfigReader, mixer: GQA, windows: int | Sequence[int | None] | None
) -> list[GQA]:
    """Each layer's attention, with its window; layer_types has to agree, where it is there."""
    every = windows if isinstance(windows, Sequence) else [windows] * reader.num_layers
    usual = [FULL if window is None else SLIDING for window in every]
    for i, (kind, window) in enumerate(zip(layer_types(reader) or usual, every, strict=True)):
        if (kind == SLIDING) != (window is not None):
            has = "no sliding window" if window is None else f"a sliding window of {window}"
            raise reader.error(
                f"layer_types[{i}] is {kind}, but the other keys give the layer {has}"
            )
    return [replace(mixer, window=window) for window in every]


def decoder(reader: ConfigReader, specs: Sequence[LayerSpec], **different: Any) -> ModelConfig:
    """What every supported architecture spells alike, and what is `different` about this one:
    fields of ModelConfig."""
    usual = {
        "model_type": reader.get("model_type"),
        "hidden_size": reader.integer("hidden_size"),
        "vocab_size": reader.integer("vocab_size"),
        "context": _context(reader, specs),
        "layers": tuple(specs),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
    }
    if "norm_eps" not in different:
        usual["norm_eps"] = reader.number("rms_norm_eps")
    return ModelConfig(**usual | different)


def _context(reader: ConfigReader, specs: Sequence[LayerSpec]) -> int:
    """What config.json states, or what the layers' rotary embeddings stretch it to."""
    stated = reader.integer("max_position_embeddings")
    ropes = {spec.mixer.rope for spec in specs if isinstance(spec.mixer, GQA | MLA)}
    return max([stated, *(stretched(stated, each) for each in ropes if each is not None)])


def stretched(stated: int, rope: RopeConfig) -> int:
    """Longest sequence, in tokens, that positions were made for, where config.json says `stated`.

    yarn and linear stretch the original context by their factor, and a config.json states that
    context before or after it: the model cards of Qwen and of vicuna add the scaling and leave
    max_position_embeddings alone, others raise it. llama3's max_position_embeddings is always what
    it was raised to; its factor is a frequency's.
    """
    if rope.scaling in ("linear", "yarn"):
        return max(stated, int(rope.original_max_position * rope.factor))
    return stated
