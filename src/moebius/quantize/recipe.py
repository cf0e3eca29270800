"""Which format each parameter of a model gets: what llama.cpp's files of these names hold.

Value and down projections have more bits in the first and last eighth of the layers and in every
third one between; so has the matrix that makes logits. Routers, norms, biases and other vectors
stay as they are. Source: llama.cpp's src/llama-quant.cpp (2026-10), as facts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.layout import Source
from moebius.ops.formats import FORMATS, BlockFormat, Dense

# What rows that are no whole blocks of 256 get instead.
_BLOCKS_OF_32 = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# Matrices that stay as they are: small, and what they choose is worth more than their bytes.
_KEPT = ("mlp.router.", "mlp.shared_gate.")
_JOINT = "self_attn.in_proj_qkv.weight"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A name that people ask for, and what it stands for.

    usual      the format of most matrices
    head       of the matrix that makes logits
    more       of value and down projections in the layers that get more bits
    experts    of routed experts, where it is not the usual one
    few        of attention's output projections in models with eight experts (Mixtral)
    joint      of queries, keys and values in one matrix
    file_type  the number in general.file_type of GGUF files, which is a label
    """

    name: str
    usual: str
    head: str
    file_type: int
    more: str | None = None
    experts: str | None = None
    few: str | None = None
    joint: str | None = None


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("q8_0", "q8_0", "q8_0", 7),
            Recipe("q6_k", "q6_k", "q6_k", 18),
            Recipe("q5_k_m", "q5_k", "q6_k", 17, more="q6_k", joint="q6_k"),
            Recipe("q4_k_m", "q4_k", "q6_k", 15, more="q6_k", few="q5_k", joint="q5_k"),
            Recipe("mxfp4", "q8_0", "q8_0", 38, experts="mxfp4"),
        )
    }
)

PLAIN: Mapping[str, Recipe] = MappingProxyType(
    {
        "bf16": Recipe("bf16", "bfloat16", "bfloat16", 32),
        "f16": Recipe("f16", "float16", "float16", 1),
        "f32": Recipe("f32", "float32", "float32", 0),
    }
)
"""Files of plain numbers, for other programs to go on from."""


def recipe(name: str, among: Mapping[str, Recipe] = RECIPES) -> Recipe:
    """Raises ConfigError for an unknown name."""
    found = among.get(name)
    if found is None:
        raise ConfigError(f"there is no quantization {name!r}; there are {', '.join(among)}")
    return found


def format_of(recipe: Recipe, source: Source, config: ModelConfig) -> str | None:
    """The format of a parameter; None where it stays as it is stored: what the recipe keeps, and
    rows that are no whole blocks of 32."""
    if len(source.shape) < 2 or source.shape[0] == 1 or source.float32:
        return None
    columns = source.shape[1]
    head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    if source.parameter == head:
        return _fitting(recipe.head, columns, "q8_0")
    layer = _LAYER.fullmatch(source.parameter)
    if layer is None:
        return _fitting(recipe.usual, columns)
    number = int(layer[1])
    role = layer[2]
    if role.startswith(_KEPT) or role.endswith("norm.weight"):
        return None
    return _fitting(_in_layer(recipe, role, number, config, source.expert is not None), columns)


def _in_layer(recipe: Recipe, role: str, number: int, config: ModelConfig, routed: bool) -> str:
    """The format of a layer's matrix, whatever its rows."""
    plain = isinstance(FORMATS.get(recipe.usual), Dense)
    eight = config.experts.get(number) == 8 and not plain
    if eight and role in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        return "q8_0"
    if eight and recipe.few and role == "self_attn.o_proj.weight":
        return recipe.few
    if routed and recipe.experts:
        return recipe.experts
    if role == _JOINT and recipe.joint:
        return recipe.joint
    sensitive = role == "self_attn.v_proj.weight" or ".down_proj" in role
    if sensitive and recipe.more and _gets_more(number, config.num_layers):
        return recipe.more
    return recipe.usual


def _gets_more(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(name: str, columns: int, instead: str | None = None) -> str | None:
    """The format, or the one for rows that are no whole blocks of it; None where nothing fits."""
    for each in (name, instead or _BLOCKS_OF_32.get(name)):
        format = FORMATS.get(str(each))
        if isinstance(format, Dense):
            return format.name
        if isinstance(format, BlockFormat) and columns % format.elements == 0:
            return format.name
    return None
