"""Models of published sizes for a card: files with holes where weights would be, and weights that
are drawn on the card once they lie there.

A model of 60 GB takes minutes to draw on a host, and more disk than there may be; a hole takes
none, and is read as zeros. Zeros alone would make figures of another machine, as products of them
take less power.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import config as made_config
from published import PUBLISHED, Published
from sizes import MADE, Sizes, Stored
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STANDARD_DEVIATION = 0.02
# As exponents of MXFP4: 2^(121 - 127) times codes of up to 6 is about what weights are.
EXPONENT = 121
_MXFP4_GROUP = 32
_DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}


@dataclass(frozen=True, slots=True)
class CardModel:
    """A model to measure.

    config_json   of Hugging Face's kind
    sizes         that count what a step reads and computes
    mxfp4         its experts are codes of 4 bits, as gpt-oss'
    """

    config_json: Mapping[str, Any]
    sizes: Sizes | Published
    mxfp4: bool = False

    @property
    def stored(self) -> Stored:
        plain = Stored.plain(self.sizes)
        if not self.mxfp4:
            return plain
        expert = self.sizes.expert * (0.5 + 1 / _MXFP4_GROUP)
        return Stored(plain.attention, plain.router, expert, plain.head)


def card_model(name: str, small: bool) -> CardModel:
    """One that is measured; `small` is a rehearsal with a model of its kind."""
    if name == "m2":
        sizes = MADE["m2"]
        if small:
            sizes = Sizes(2, 64, 4, 2, 16, 4, 2, 32, 4096)
        return CardModel(made_config(sizes), sizes)
    config_json = dict(PUBLISHED[name].config_json)
    if small:
        config_json |= _SMALL[name]
    mxfp4 = config_json["model_type"] == "gpt_oss"
    if mxfp4:
        config_json["quantization_config"] = {"quant_method": "mxfp4"}
    return CardModel(config_json, Published(config_json), mxfp4)


_SMALL: dict[str, dict[str, Any]] = {
    "qwen3-30b": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "vocab_size": 4096,
    },
    "gpt-oss-20b": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 4096,
    },
    "qwen3.5-35b": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "vocab_size": 4096,
    },
    "glm-4.7-flash": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse"],
        "vocab_size": 4096,
    },
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: numbers that are all one value, or a hole where that is 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def write_hollow(model: CardModel, directory: Path) -> int:
    """A checkpoint of these sizes, all holes but norms (ones) and exponents; its bytes.

    It has the bundled model's tokenizer: prompts are token ids, and any will do.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(model.config_json)))
    bundled = ROOT / "src" / "moebius" / "bundled"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, directory)
    entries = list(_entries(model, directory))
    head: dict[str, Any] = {}
    end = 0
    for entry in entries:
        offsets = [end, end + entry.nbytes]
        head[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            if entry.value:
                numbers = torch.full(entry.shape, entry.value, dtype=_DTYPES[entry.dtype])
                file.write(numbers.flatten().view(torch.uint8).numpy().tobytes())
            else:
                file.seek(entry.nbytes, 1)
        file.truncate()
    return end


def _entries(model: CardModel, directory: Path) -> Iterator[Entry]:
    from moebius.models.description import describe
    from moebius.models.layout import sources

    described = describe(directory)
    known: set[str] = set()
    for source in sources(described.config, described.layouts[0]):
        if source.name in known:
            continue
        known.add(source.name)
        if model.mxfp4 and source.name.endswith(("gate_up_proj", "down_proj")):
            yield from _in_mxfp4(source.name, source.stored_shape)
        else:
            ones = source.name.endswith("norm.weight")
            yield Entry(source.name, "BF16", source.stored_shape, int(ones))


def _in_mxfp4(name: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    """Codes and exponents of matrices that plain numbers are stored on their side of: (E, I, O)."""
    experts, columns, rows = shape
    groups = columns // _MXFP4_GROUP
    yield Entry(f"{name}_blocks", "U8", (experts, rows, groups, _MXFP4_GROUP // 2))
    yield Entry(f"{name}_scales", "U8", (experts, rows, groups), EXPONENT)


@torch.no_grad()
def draw_holes(decoder: torch.nn.Module, seed: int = 0) -> int:
    """Draws what was a hole, where it lies: how many tensors. What is in them is no zero. What lies
    elsewhere than the embedding stays: experts of the host are a file's pages, which cannot be
    written."""
    from moebius.models.decoder import Decoder

    assert isinstance(decoder, Decoder)
    drawn = 0
    own = decoder.embed_tokens.weight.device
    for number, tensor in enumerate(_tensors(decoder)):
        if tensor.device != own or not tensor.numel() or bool(tensor.flatten()[:16].ne(0).any()):
            continue
        generator = torch.Generator(tensor.device).manual_seed(seed * 2**20 + number)
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        else:
            tensor.normal_(0, STANDARD_DEVIATION, generator=generator)
        drawn += 1
    decoder.changes.count += 1  # what was recorded, or copied, is of zeros
    return drawn


def _tensors(decoder: torch.nn.Module) -> Iterator[Tensor]:
    """All that a decoder computes with, each once."""
    from moebius.nn.linear import Weighted, WeightList
    from moebius.ops.weights import planes_of

    seen: set[int] = set()
    for module in decoder.modules():
        found: list[Tensor | None] = list(module.parameters(recurse=False))
        if isinstance(module, WeightList):
            found += planes_of(module.held())
        elif isinstance(module, Weighted):
            found += planes_of([module.held()])
        for tensor in found:
            if tensor is not None and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield tensor
