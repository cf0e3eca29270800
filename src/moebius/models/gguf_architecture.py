"""What llama.cpp's files call a family's tensors and keys: a record beside each family, or one for
each way in which its models lie in such files.

The record is read both ways: a GGUF file's keys become a config.json (moebius.models.gguf_config),
and a config.json the keys of a GGUF file. Facts as llama.cpp's converter has them: conversion/ and
src/llama-model.cpp of October 2026.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.layout import Layout, Names, Stacked, stacked
from moebius.models.parts import DENSE, SPARSE, every_nth_full
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA
from moebius.nn.mixer import Mixer

GATE_UP_DOWN = ("gate", "up", "down")
_OF_MIXER = re.compile(r"(layers\.(\d+)\.self_attn\.)(.+)")


Shapes = Mapping[str, tuple[int, ...]]
"""Of a file's tensors."""
Absent = Callable[[Mapping[str, object]], object]
"""What config.json has of a key that a file lacks, told from what it has of others."""


def required(_: Mapping[str, object]) -> object:
    """For `Key.absent`: no file does without."""
    raise KeyError


def meaning(value: object) -> Absent:
    """For `Key.absent`: what llama.cpp takes instead."""
    return lambda _: value


@dataclass(frozen=True, slots=True)
class Key:
    """A key of config.json, and the same in a GGUF file.

    config   config.json's; "" where the file's tensors tell it, and config.json by other keys
    gguf     the file's, behind the architecture's name and a dot
    kind     how it is stored: uint32, float32, bool; or a bool for each layer, whether it has a
             window
    absent   what it means that the file has none, told from what config.json has by then;
             KeyError: every file has it
    optional   config.json may have none, and then the file has none
    """

    config: str
    gguf: str
    kind: Literal["integer", "number", "flag", "sliding"] = "integer"
    absent: Absent = required
    optional: bool = False


class FileKeys(Protocol):
    """The keys of a file under its architecture's name."""

    def get(self, key: str, default: Value) -> Value:
        """Of a list, one for each layer, what they all are: ConfigError where they differ."""

    def listed(self, key: str) -> Sequence[object] | None:
        """A list as it is; None where there is none."""

    def each(self, key: str, layers: int) -> list[int]:
        """An integer for each layer, where the file may have one for all. ConfigError for others,
        and for none."""

    def wrong(self, key: str, message: str) -> ConfigError:
        """What is wrong with a key."""


class Moved(NamedTuple):
    """What of a parameter is otherwise in a file than in Hugging Face's checkpoints.

    parameter       of the layer's mixer there, which it is made of
    rows, columns   which of the latter's stands where; None: all where they are
    exponential     the file holds -exp of the numbers, or if that is `positive`, exp
    """

    parameter: str
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    exponential: bool = False
    positive: bool = False


def _nothing_read(keys: FileKeys, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def _nothing_written(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Value]:
    return {}


def nothing_told(shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def told_by_routers(shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """mlp_layer_types: a layer with a router has experts."""
    routers = [f"blk.{i}.ffn_gate_inp.weight" for i in range(config["num_hidden_layers"])]
    return {"mlp_layer_types": [SPARSE if name in shapes else DENSE for name in routers]}


def _as_it_is(mixer: Mixer) -> Mixer:
    return mixer


def _nothing_moved(mixer: Mixer, name: str) -> Moved | None:
    return None


def _head_size(config: Mapping[str, object]) -> int:
    width = config["hidden_size"]
    heads = config["num_attention_heads"]
    assert isinstance(width, int) and isinstance(heads, int), "the file's keys were integers"
    # Whoever reads the configuration says that there must be heads.
    return width // max(heads, 1)


USUAL_KEYS = (
    Key("num_hidden_layers", "block_count"),
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("intermediate_size", "feed_forward_length"),
    Key("num_attention_heads", "attention.head_count"),
    Key(
        "num_key_value_heads",
        "attention.head_count_kv",
        absent=lambda config: config["num_attention_heads"],
    ),
    Key("head_dim", "attention.key_length", absent=_head_size),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", "number"),
    Key("rope_theta", "rope.freq_base", "number", meaning(10_000.0)),
)


def expert_keys(
    count: str, width: str | None = None, chosen: str = "num_experts_per_tok"
) -> tuple[Key, ...]:
    """Of experts, whose number and width config.json has under these names, and how many a token
    has; width None: they have the width that USUAL_KEYS say."""
    keys = (Key(count, "expert_count"), Key(chosen, "expert_used_count"))
    return keys if width is None else (*keys, Key(width, "expert_feed_forward_length"))


SHARED_WIDTH = Key("", "expert_shared_feed_forward_length", absent=meaning(0))
SLIDING_LAYERS = "attention.sliding_window_pattern"
SLIDING_SIZE = "attention.key_length_swa"
SLIDING_WINDOW = Key("sliding_window", "attention.sliding_window", absent=meaning(None))


def sliding_layers(period: int, *, full_first: bool = False) -> Key:
    """Which layers have a window; without the key, all but the last, or the first, of each
    `period`."""

    def usual(config: Mapping[str, object]) -> list[str]:
        layers = config["num_hidden_layers"]
        assert isinstance(layers, int), "the file's key was an integer"
        before = period - 1 if full_first else 0
        return every_nth_full(before + layers, period)[before:]

    return Key("layer_types", SLIDING_LAYERS, "sliding", usual)


ROUTER_KEYS = (
    Key("routed_scaling_factor", "expert_weights_scale", "number"),
    Key("norm_topk_prob", "expert_weights_norm", "flag", meaning(False)),
    Key("n_group", "expert_group_count", absent=meaning(1)),
    Key("topk_group", "expert_group_used_count", absent=meaning(1)),
)
"""Of DeepSeek-V3's router."""
MULTIPLIER_KEYS = (
    Key("attention_multiplier", "attention.scale", "number"),
    Key("embedding_multiplier", "embedding_scale", "number"),
    Key("residual_multiplier", "residual_scale", "number"),
    Key("logits_scaling", "logit_scale", "number"),
)
"""Of Granite's four places."""

_ATTENTION = ("q", "k", "v")
_PARTS = ("weight", "bias")
USUAL_NAMES: Names = {
    "input_layernorm.weight": "attn_norm.weight",
    **{f"self_attn.{x}_proj.{part}": f"attn_{x}.{part}" for x in _ATTENTION for part in _PARTS},
    **{f"self_attn.o_proj.{part}": f"attn_output.{part}" for part in _PARTS},
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **layout.dense("ffn_{p}", GATE_UP_DOWN),
    **layout.shared("ffn_{p}_shexp", GATE_UP_DOWN),
    **{f"mlp.experts.{x}_proj": Stacked(f"ffn_{x}_exps.weight") for x in GATE_UP_DOWN},
    **{f"mlp.experts.{x}_bias": Stacked(f"ffn_{x}_exps.bias") for x in GATE_UP_DOWN},
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.router.selection_bias": "exp_probs_b.bias",
    "mlp.shared_gate.weight": "ffn_gate_inp_shexp.weight",
}
# Gate and up of all experts in one tensor, as some newer files have them.
_FUSED = stacked("ffn_gate_up_exps.weight", "ffn_down_exps.weight")
# A tensor for each expert, as the files of early 2024 have them.
_APART = layout.experts("ffn_{p}.{e}", projections=GATE_UP_DOWN)


def layouts(names: Names | None = None) -> tuple[Layout, ...]:
    """Of files that call tensors as most do, but for `names`: what is written first."""
    usual = {**USUAL_NAMES, **(names or {})}
    return tuple(
        Layout(
            {**usual, **experts},
            layer="blk.{i}.",
            embedding="token_embd.weight",
            norm="output_norm.weight",
            head="output.weight",
            centred=False,
        )
        for experts in ({}, _FUSED, _APART)
    )


def _nowhere(_: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How GGUF files have a family's models.

    name      general.architecture
    keys      config.json's keys and the file's
    sparse    its files have experts: tells families apart that share a name; None: all of a model's
              feed-forwards have, or none
    fixed     what llama.cpp's code takes for granted, as config.json says it: files do not tell it,
              and a model for which it is not so cannot be written
    values    keys of the file that must have this value where they are present, and are written
    present   flags of config.json that are on where the file has a tensor of that name
    layouts   what tensors are called, the way that is written first
    partial   a part of each head may turn (partial_rotary_factor): the file says how much
    ropes     `one` turns all layers, those that are `sliding`, or `some`, while the others have no
              positions; or `each` kind of layer has its own; or one turns all or none does (`any`);
              or none does, and attention is no GQA whose sizes the usual keys say (`none`)
    sliding_theta     theta of layers with a window, where the file does not say it; None: as the
                      others'
    proportional      divisors of frequencies are of full attention alone, and say which of them
                      are 0
    told      what config.json would have that the file's tensors tell, by their shapes
    marked    a key that tells its files from others of that name, where it is there and not 0
    marks     whether a file's keys are of this kind, where several share the name; None where
              nothing tells
    holding   a pattern of tensors that tells its files from others of that name, where one is there
    unused    patterns of tensors that its files may hold for nothing
    latent    layers have latent attention: the sizes of heads are the family's to read and write
    permuted  the rows of queries and keys are reordered, so that the pairs that are rotated stand
              side by side (see `pair_rows`)
    slides    whether a layer has the window that the file states
    truncates yarn's range of dimensions is whole ones, as llama.cpp has it of every model; where
              it is not, files mean what the model was trained with
    read      what else config.json has, told from keys that are not one by one its own
    write     these keys, from a config.json and what it describes
    held      a mixer of a config.json as it lies in such a file
    moved     what a parameter of that mixer, by its name, is made of, where it is otherwise there
              than config.json's mixer has it
    """

    name: str
    keys: tuple[Key, ...] = USUAL_KEYS
    sparse: bool | None = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = field(default_factory=layouts)
    permuted: bool = False
    slides: Callable[[int], bool] = _nowhere
    truncates: bool = True
    partial: bool = False
    marked: str = ""
    marks: Callable[[Mapping[str, object]], bool] | None = None
    holding: str = ""
    unused: tuple[str, ...] = ()
    latent: bool = False
    ropes: Literal["one", "sliding", "some", "each", "any", "none"] = "one"
    sliding_theta: float | None = None
    proportional: bool = False
    told: Callable[[Shapes, Mapping[str, Any]], Mapping[str, Any]] = nothing_told
    read: Callable[[FileKeys, Mapping[str, Any]], Mapping[str, Any]] = _nothing_read
    write: Callable[[ConfigReader, ModelConfig], Mapping[str, Value]] = _nothing_written
    held: Callable[[Mixer], Mixer] = _as_it_is
    moved: Callable[[Mixer, str], Moved | None] = _nothing_moved

    def made_of(self, parameter: str, config: ModelConfig) -> Moved | None:
        """What a file's parameter is made of, by whole names, in a model of a config.json; None for
        that of the same name as it is."""
        place = _OF_MIXER.fullmatch(parameter)
        if place is None:
            return None
        before, number, name = place.groups()
        mixer = config.layers[int(number)].mixer
        assert mixer is not None, "it has this parameter"
        moved = self.moved(mixer, name)
        if self.permuted and isinstance(mixer, GQA):
            # Neighbours turn together.
            every = {"q_proj": mixer.num_heads, "k_proj": mixer.num_kv_heads}
            heads = every.get(name.partition(".")[0])
            moved = None if heads is None else Moved(name, pair_rows(heads, mixer.head_dim))
        return None if moved is None else moved._replace(parameter=before + moved.parameter)

    def held_config(self, config: ModelConfig) -> ModelConfig:
        """A model of a config.json, as it lies in such a file."""
        layers = (
            layer if layer.mixer is None else replace(layer, mixer=self.held(layer.mixer))
            for layer in config.layers
        )
        return replace(config, layers=tuple(layers))


def pair_rows(heads: int, head_dim: int) -> list[int]:
    """Which of config.json's rows of q_proj or k_proj stands in each of a permuted file's.

    Of a head, row i and row i + head_dim / 2, which are rotated together, become 2i and 2i + 1.
    """
    half = head_dim // 2
    one = [part * half + i for i in range(half) for part in (0, 1)]
    return [head * head_dim + row for head in range(heads) for row in one]
