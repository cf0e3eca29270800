"""Tiny checkpoints of every kind that a quantization_config may name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebius.models.decoder import Decoder
from moebius.nn.linear import Weighted, WeightList
from moebius.ops import Weight
from oracle import save_tiny
from packing import (
    Pack,
    Tensors,
    awq,
    byte_integers,
    fp8,
    gptq,
    mlx,
    mxfp4,
    nvfp4,
    packed_integers,
)


@dataclass(frozen=True)
class Kind:
    """One way to store a checkpoint.

    repacked   its matrices are copied when they are loaded
    embedding  embeddings are quantised as linear layers are
    """

    config: dict[str, Any]
    pack: Pack
    key: str = "quantization_config"
    repacked: bool = False
    embedding: bool = False
    formats: set[str] = field(default_factory=set)


def is_quantised(name: str, tensor: Tensor, kind: Kind) -> bool:
    if tensor.ndim != 2 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
        return False
    return kind.embedding or not name.endswith(("embed_tokens.weight", "lm_head.weight"))


def write_quantised(directory: Path, kind: Kind) -> Tensors:
    """Quantise the checkpoint in a directory; returns the numbers that its tensors stand for."""
    file = directory / "model.safetensors"
    stored, meant = {}, {}
    for name, tensor in load_file(file).items():
        if is_quantised(name, tensor, kind):
            parts, numbers = kind.pack(name, tensor.float())
            stored.update(parts)
            meant[name] = numbers
        else:
            stored[name] = meant[name] = tensor
    save_file(stored, file)
    change_config(directory, **{kind.key: kind.config})
    return meant


def change_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def args(bits: int, group: int, kind: str = "int", **more: object) -> dict[str, Any]:
    """compressed-tensors' weights."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **strategy, **more}


def compressed(format: str, weights: dict[str, Any], **more: object) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
        **more,
    }


def gptq_config(bits: int, group: int, **more: object) -> dict[str, Any]:
    usual = {"quant_method": "gptq", "damp_percent": 0.1, "true_sequential": True, "lm_head": False}
    return {
        **usual,
        "bits": bits,
        "group_size": group or -1,
        "desc_act": False,
        "sym": True,
        **more,
    }


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
_NVFP4 = ("_packed", "_scale", "_global_scale")
KINDS: dict[str, Kind] = {
    "fp8-block": Kind(
        {**_FP8, "weight_block_size": [24, 40], "modules_to_not_convert": ["lm_head"]},
        fp8((24, 40), "_scale_inv", F32),
        formats={"fp8[24x40,float32]"},
    ),
    "fp8-ue8m0": Kind(
        {**_FP8, "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
        fp8((16, 16), "_scale_inv", torch.float8_e8m0fnu),
        formats={"fp8[16x16,float8_e8m0fnu]"},
    ),
    "fp8-exponents": Kind(
        {**_FP8, "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
        fp8((16, 16), "_scale_inv", torch.uint8),
        formats={"fp8[16x16,float8_e8m0fnu]"},
    ),
    "fp8-tensor": Kind(
        {**_FP8, "activation_scheme": "static"},
        fp8(None, "_scale", F32, flat=True),
        formats={"fp8[0x0,float32]"},
    ),
    "fp8-row": Kind(_FP8, fp8((1, 0), "_scale", BF16), formats={"fp8[1x0,bfloat16]"}),
    "fbgemm": Kind(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        fp8((1, 0), "_scale", F32),
        formats={"fp8[1x0,float32]"},
    ),
    "float-quantized": Kind(
        compressed("float-quantized", args(8, 0, "float")),
        fp8((1, 0), "_scale", BF16),
        formats={"fp8[1x0,bfloat16]"},
    ),
    "mxfp4": Kind(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]},
        mxfp4(("_blocks", "_scales"), blocks=True),
        formats={"mxfp4_planes"},
    ),
    "mxfp4-pack-quantized": Kind(
        compressed("mxfp4-pack-quantized", args(4, 32, "float")),
        mxfp4(("_packed", "_scale"), blocks=False),
        formats={"mxfp4_planes"},
    ),
    "nvfp4-pack-quantized": Kind(
        compressed("nvfp4-pack-quantized", args(4, 16, "float", strategy="tensor_group")),
        nvfp4(_NVFP4, divided=True),
        formats={"nvfp4_divided"},
    ),
    "modelopt": Kind(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.gate"]},
        nvfp4(("", "_scale", "_scale_2"), divided=False),
        formats={"nvfp4_multiplied"},
    ),
    "pack-4": Kind(
        compressed("pack-quantized", args(4, 32)),
        packed_integers(4, 32, BF16),
        formats={"int4[32,bfloat16]"},
    ),
    "pack-8-channel": Kind(
        compressed("pack-quantized", args(8, 0)),
        packed_integers(8, 0, F16),
        formats={"int8_words[0,float16]"},
    ),
    "pack-4-zeros": Kind(
        compressed("pack-quantized", args(4, 16, symmetric=False)),
        packed_integers(4, 16, BF16, zeros=True),
        formats={"int4[16,bfloat16,words zeros]"},
    ),
    "pack-8-zeros": Kind(
        compressed("pack-quantized", args(8, 32, symmetric=False)),
        packed_integers(8, 32, F32, zeros=True),
        formats={"int8_words[32,float32,words zeros]"},
    ),
    "pack-4-ordered": Kind(
        compressed("pack-quantized", args(4, 16, actorder="group")),
        packed_integers(4, 16, BF16, ordered=True),
        repacked=True,
        formats={"int4_ordered[16,bfloat16]"},
    ),
    "int-quantized": Kind(
        compressed("int-quantized", args(8, 0)),
        byte_integers(0, BF16),
        formats={"int8[0,bfloat16]"},
    ),
    "int-zeros": Kind(
        compressed("int-quantized", args(8, 0, symmetric=False)),
        byte_integers(0, F32, zeros=True),
        formats={"int8[0,float32,int8 zeros]"},
    ),
    "gptq": Kind(
        gptq_config(4, 16, checkpoint_format="gptq"),
        gptq(4, 16, stored_zero=7),
        repacked=True,
        formats={"int4[16,float16]"},
    ),
    "gptq-mislabelled": Kind(
        gptq_config(4, 16, checkpoint_format="gptq"),
        gptq(4, 16, stored_zero=8),
        repacked=True,
        formats={"int4[16,float16]"},
    ),
    "gptq-8": Kind(
        gptq_config(8, 0),
        gptq(8, 0, stored_zero=127, index=False),
        repacked=True,
        formats={"int8_words[0,float16]"},
    ),
    "gptq-zeros": Kind(
        gptq_config(4, 32, sym=False),
        gptq(4, 32),
        repacked=True,
        formats={"int4[32,float16,int8 zeros]"},
    ),
    "gptq-zeros-v2": Kind(
        gptq_config(8, 16, sym=False, checkpoint_format="gptq_v2"),
        gptq(8, 16, less=0),
        repacked=True,
        formats={"int8_words[16,float16,int16 zeros]"},
    ),
    "gptq-ordered": Kind(
        gptq_config(4, 16, desc_act=True, sym=False),
        gptq(4, 16, ordered=True),
        repacked=True,
        formats={"int4_ordered[16,float16,int8 zeros]"},
    ),
    "awq": Kind(_AWQ, awq(16), repacked=True, formats={"int4[16,float16,int8 zeros]"}),
    "mlx-4": Kind(
        {"group_size": 32, "bits": 4},
        mlx(4, 32),
        key="quantization",
        embedding=True,
        formats={"affine4[32,float16]"},
    ),
    "mlx-8": Kind(
        {"group_size": 32, "bits": 8, "mode": "affine", "model.embed_tokens": False},
        mlx(8, 32),
        key="quantization",
        formats={"affine8[32,float16]"},
    ),
}


SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 72},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32, "head_dim": 16},
    "phi3": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 72},
}


def made(directory: Path, kind: Kind, model_type: str = "qwen3_moe") -> dict[str, Tensor]:
    """A tiny checkpoint in float32, its matrices quantised; returns what they mean."""
    directory.mkdir(exist_ok=True)
    save_tiny(directory, model_type, **SIZES[model_type])
    return write_quantised(directory, kind)


def held(decoder: Decoder) -> dict[str, Weight]:
    """What every parameter is, by its name; holes left out."""
    found: dict[str, Weight] = dict(decoder.named_parameters())
    for name, module in decoder.named_modules():
        if isinstance(module, Weighted):
            found[f"{name}.weight"] = module.held()
        elif isinstance(module, WeightList):
            for number, weight in enumerate(module.held()):
                if weight is not None:
                    found[f"{name}.{number}"] = weight
    return found


def tampered(directory: Path, change: dict[str, Tensor | None]) -> None:
    """Other tensors under these names, or none."""
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
