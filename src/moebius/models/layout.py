"""Which checkpoint tensor, or which part of one, each parameter of a decoder comes from. No
tensors, only shapes.

A Layout names the tensors of one layer's feed-forward; all supported architectures spell the rest
alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moebius.config import FeedForwardConfig, ModelConfig

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """Names below `model.layers.{i}.`, but for the embedding's, which is whole; {e} stands for the
    expert's number, {p} for the projection.

    expert        one tensor an expert and projection, or None where experts are stacked in
    gate_up       (E, 2F, D), gate rows first, and
    down          (E, D, F)
    projections   what this checkpoint calls gate, up and down
    shared        the expert that is always on
    embedding     the tensor of the embedding: the head's, where that alone is stored and serves as
                  both
    """

    router: str = "mlp.gate.weight"
    expert: str | None = "mlp.experts.{e}.{p}.weight"
    gate_up: str = ""
    down: str = ""
    projections: tuple[str, str, str] = PROJECTIONS
    shared: str = "mlp.shared_expert.{p}"
    embedding: str = EMBEDDING


FUSED = Layout(expert=None, gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj")
SELECTION_BIAS, SHARED_GATE = "mlp.gate.e_score_correction_bias", "mlp.shared_expert_gate.weight"
NOISE, ROUTER_BIAS = "mlp.gate.noise.weight", "mlp.gate.bias"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter's values are: a whole tensor, or rows start to stop of entry `entry` of a
    stacked one.

    shape is the parameter's, stored_shape the checkpoint tensor's. A parameter that is float32
    stays so in any model.
    """

    parameter: str
    shape: tuple[int, ...]
    name: str
    stored_shape: tuple[int, ...]
    entry: int | None = None
    start: int = 0
    float32: bool = False


def _whole(parameter: str, name: str, *shape: int) -> Source:
    return Source(parameter, shape, name, shape)


def sources(config: ModelConfig, layout: Layout) -> Iterator[Source]:
    """One Source for each parameter of Decoder(config)."""
    width = config.hidden_size
    yield _whole("embed_tokens.weight", layout.embedding, config.vocab_size, width)
    for layer in range(config.num_layers):
        here, there = f"layers.{layer}.", f"model.layers.{layer}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield _whole(here + norm, there + norm, width)
        yield from _attention(config, here + "self_attn.", there + "self_attn.")
        yield from _feed_forward(config, layout, layer, here + "mlp.", there)
    yield _whole("norm.weight", "model.norm.weight", width)
    if not config.tie_word_embeddings:
        yield _whole("lm_head.weight", HEAD, config.vocab_size, width)


def _attention(config: ModelConfig, here: str, there: str) -> Iterator[Source]:
    for name, size in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
        weight, bias = f"{name}_proj.weight", f"{name}_proj.bias"
        yield _whole(here + weight, there + weight, size, config.hidden_size)
        if config.qkv_bias:
            yield _whole(here + bias, there + bias, size)
        if config.qk_norm != "none" and name != "v":
            norm = f"{name}_norm.weight"
            yield _whole(
                here + norm, there + norm, size if config.qk_norm == "full" else config.head_dim
            )
    yield _whole(here + "o_proj.weight", there + "o_proj.weight", config.hidden_size, config.q_size)
    if config.output_bias:
        yield _whole(here + "o_proj.bias", there + "o_proj.bias", config.hidden_size)


def _feed_forward(
    config: ModelConfig, layout: Layout, layer: int, here: str, there: str
) -> Iterator[Source]:
    part, width = config.feed_forward[layer], config.hidden_size
    if part.router is None:
        yield from _expert(
            here + "experts.", 0, there + "mlp.{p}", PROJECTIONS, part, (part.width, width)
        )
        return
    count = part.router.num_experts
    yield _whole(here + "router.weight", there + layout.router, count, width)
    if part.router.logit_bias:
        yield _whole(here + "router.bias", there + ROUTER_BIAS, count)
    if part.router.selection_bias:
        yield Source(
            here + "router.selection_bias", (count,), there + SELECTION_BIAS, (count,), float32=True
        )
    if part.router.learned_noise:
        yield _whole(here + "router.noise_weight", there + NOISE, count, width)
    for e in range(count):
        if layout.expert is None:
            yield from _stacked_expert(
                here + "experts.", e, there, layout, (count, part.width, width)
            )
        else:
            name = (there + layout.expert).removesuffix(".weight").replace("{e}", str(e))
            yield from _expert(
                here + "experts.", e, name, layout.projections, part, (part.width, width)
            )
    if part.shared_width:
        yield from _expert(
            here + "shared.",
            0,
            there + layout.shared,
            PROJECTIONS,
            part,
            (part.shared_width, width),
        )
        if part.shared_gate:
            yield _whole(here + "shared_gate.weight", there + SHARED_GATE, 1, width)


def _expert(
    here: str,
    e: int,
    name: str,
    names: tuple[str, str, str],
    part: FeedForwardConfig,
    sizes: tuple[int, int],
) -> Iterator[Source]:
    """A feed-forward stored as three matrices, or two where it is not gated, and as many biases
    where it has them."""
    for ours, theirs in zip(PROJECTIONS, names, strict=True):
        if ours == "up_proj" and not part.gated:
            continue
        shape = sizes[::-1] if ours == "down_proj" else sizes
        stored = name.replace("{p}", theirs)
        yield _whole(f"{here}{ours}.{e}", stored + ".weight", *shape)
        if part.bias:
            yield _whole(f"{here}{ours.removesuffix('_proj')}_bias.{e}", stored + ".bias", shape[0])


def _stacked_expert(
    here: str, e: int, there: str, layout: Layout, sizes: tuple[int, int, int]
) -> Iterator[Source]:
    count, width, hidden = sizes
    gate_up = (count, 2 * width, hidden)
    yield Source(f"{here}gate_proj.{e}", (width, hidden), there + layout.gate_up, gate_up, e, 0)
    yield Source(f"{here}up_proj.{e}", (width, hidden), there + layout.gate_up, gate_up, e, width)
    yield Source(
        f"{here}down_proj.{e}", (hidden, width), there + layout.down, (count, hidden, width), e, 0
    )
