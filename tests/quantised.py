"""Tiny checkpoints as the tools of Hugging Face's world quantise them.

Each kind packs a weight into its tensors, bit by bit in plain Python's arithmetic, and says which
numbers they stand for: worked out of the codes before they were packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
# From a weight's name and numbers to its tensors, and what these mean.
Pack = Callable[[str, Tensor], tuple[Tensors, Tensor]]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


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


def stem(name: str) -> str:
    return name.removesuffix(".weight")


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes along the last dimension in int32 words, the lowest bits first; the last word
    is filled up with zeros."""
    per_word = 32 // bits
    rows, columns = codes.shape
    found = []
    for row in codes.tolist():
        row += [0] * (-columns % per_word)
        for start in range(0, len(row), per_word):
            value = sum(c << (bits * i) for i, c in enumerate(row[start : start + per_word]))
            found.append(value - (1 << 32) if value >= 1 << 31 else value)
    return torch.tensor(found, dtype=torch.int32).view(rows, -1)


def per_column(of_groups: Tensor, columns: int) -> Tensor:
    """What a group of columns has, for each of them."""
    return of_groups.repeat_interleave(columns // of_groups.shape[1], 1)


def grid(weight: Tensor, group: int, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales (N, G) of `dtype`, and numbers in units of them, for symmetric codes."""
    rows, columns = weight.shape
    most = weight.view(rows, -1, group or columns).abs().amax(-1)
    scales = (most / levels).to(dtype)
    return scales, weight / per_column(scales.float(), columns)


# --- FP8 ---


def fp8(
    block: tuple[int, int] | None, suffix: str, dtype: torch.dtype, *, flat: bool = False
) -> Pack:
    """A scale a block, or a row (1, 0), or one for all: None."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        n, k = block or (rows, columns)
        k = k or columns
        scales = torch.empty(-(-rows // n), -(-columns // k))
        wide = torch.empty_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * n, (i + 1) * n), slice(j * k, (j + 1) * k)
                scale = weight[part].abs().max() / 448
                if dtype in (torch.float8_e8m0fnu, torch.uint8):
                    scale = torch.exp2(torch.ceil(torch.log2(scale)))
                scales[i, j] = scale
                wide[part] = scale
        if dtype == torch.uint8:
            stored = (torch.log2(scales) + 127).to(torch.uint8)
        else:
            stored = scales.to(dtype)
            wide = wide.to(dtype).float()
        codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        if block is None:
            stored = stored.view(()) if flat else stored.view(1)
        elif flat:
            stored = stored.view(-1)
        return {name: codes, name + suffix: stored}, codes.float() * wide

    return pack


# --- FP4 ---


def e2m1(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes 0 to 15, and what they mean."""
    table = torch.tensor(E2M1)
    index = (numbers.abs().unsqueeze(-1) - table).abs().argmin(-1)
    negative = numbers < 0
    return index + 8 * negative.long(), torch.where(negative, -table[index], table[index])


def nibble_bytes(codes: Tensor) -> Tensor:
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


def mxfp4(suffixes: tuple[str, str], *, blocks: bool) -> Pack:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        most = weight.view(rows, -1, 32).abs().amax(-1)
        exponents = torch.ceil(torch.log2(most / 6)).clamp(-127, 127)
        wide = per_column(torch.exp2(exponents), columns)
        codes, numbers = e2m1(weight / wide)
        packed = nibble_bytes(codes)
        if blocks:
            packed = packed.view(rows, -1, 16)
        scales = (exponents + 127).to(torch.uint8)
        return {name + suffixes[0]: packed, name + suffixes[1]: scales}, numbers * wide

    return pack


def nvfp4(suffixes: tuple[str, str, str], *, divided: bool) -> Pack:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        most = weight.view(rows, -1, 16).abs().amax(-1)
        whole = (weight.abs().max() / (6 * 448)).view(1)
        stored = (most / 6 / whole).to(torch.float8_e4m3fn)
        if divided:
            whole = 1 / whole
        scales = stored.float() / whole if divided else stored.float() * whole
        wide = per_column(scales, columns)
        codes, numbers = e2m1(weight / wide.clamp(min=1e-30))
        tensors = {
            name + suffixes[0]: nibble_bytes(codes),
            name + suffixes[1]: stored,
            name + suffixes[2]: whole if divided else whole.view(()),
        }
        return tensors, numbers * wide

    return pack


# --- integers of compressed-tensors ---


def asymmetric(
    weight: Tensor, group: int, bits: int, dtype: torch.dtype, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unsigned codes (N, K), zero points (N, G), scales (N, G), and what they mean.

    order: the group of each column.
    """
    rows, columns = weight.shape
    groups = columns // group if group else 1
    if order is None:
        order = torch.arange(columns) // (group or columns)
    codes = torch.empty(rows, columns, dtype=torch.int64)
    zeros = torch.empty(rows, groups, dtype=torch.int64)
    scales = torch.empty(rows, groups)
    meant = torch.empty_like(weight)
    for g in range(groups):
        part = weight[:, order == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / ((1 << bits) - 1)).to(dtype).float()
        zero = (-low / scale).round().clamp(0, (1 << bits) - 1)
        q = (part / scale.unsqueeze(1) + zero.unsqueeze(1)).round().clamp(0, (1 << bits) - 1)
        codes[:, order == g] = q.long()
        zeros[:, g] = zero.long()
        scales[:, g] = scale
        meant[:, order == g] = (q - zero.unsqueeze(1)) * scale.unsqueeze(1)
    return codes, zeros, scales.to(dtype), meant


def packed_integers(
    bits: int,
    group: int,
    dtype: torch.dtype,
    *,
    zeros: bool = False,
    ordered: bool = False,
) -> Pack:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        order = shuffled(columns, group) if ordered else None
        codes, zero_points, scales, meant = asymmetric(weight, group, bits, dtype, order)
        if not zeros:
            middle = 1 << (bits - 1)
            of_columns = (
                scales.float()[:, order] if ordered else per_column(scales.float(), columns)
            )
            codes = ((weight / of_columns).round() + middle).clamp(0, 2 * middle - 1).long()
            meant = (codes - middle) * of_columns
        tensors = {
            name + "_packed": words(codes, bits),
            name + "_scale": scales,
            name + "_shape": torch.tensor([rows, columns]),
        }
        if zeros:
            tensors[name + "_zero_point"] = words(zero_points.T, bits).T.contiguous()
        if ordered:
            tensors[name + "_g_idx"] = order.int()
        return tensors, meant

    return pack


def byte_integers(group: int, dtype: torch.dtype, *, zeros: bool = False) -> Pack:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, zero_points, scales, meant = asymmetric(weight, group, 8, dtype)
        tensors = {name: (codes - 128).to(torch.int8), name + "_scale": scales}
        if zeros:
            tensors[name + "_zero_point"] = (zero_points - 128).to(torch.int8)
            return tensors, meant
        wide = per_column(scales.float(), weight.shape[1])
        symmetric = (weight / wide).round().clamp(-128, 127)
        return {**tensors, name: symmetric.to(torch.int8)}, symmetric * wide

    return pack


# --- GPTQ, AWQ, MLX ---


def shuffled(columns: int, group: int) -> Tensor:
    """Groups of as many columns each, in no order."""
    generator = torch.Generator().manual_seed(columns)
    order = torch.arange(columns) // (group or columns)
    return order[torch.randperm(columns, generator=generator)]


def gptq(
    bits: int,
    group: int,
    *,
    stored_zero: int | None = None,
    less: int = 1,
    ordered: bool = False,
    index: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Pack:
    """stored_zero: all zero points are 2^(bits-1), and this is what is stored for them; else what
    is stored is `less` than they are."""

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        columns = weight.shape[1]
        following = torch.arange(columns) // (group or columns)
        order = shuffled(columns, group) if ordered else following
        codes, zeros, scales, meant = asymmetric(weight, group, bits, dtype, order)
        stored = zeros.clamp(min=less) - less
        if stored_zero is not None:
            middle = 1 << (bits - 1)
            of_columns = scales.float()[:, order]
            codes = ((weight / of_columns).round() + middle).clamp(0, 2 * middle - 1).long()
            meant = (codes - middle) * of_columns
            stored = torch.full_like(zeros, stored_zero)
        elif less:
            meant = (codes - zeros.clamp(min=less)[:, order]) * scales.float()[:, order]
        tensors = {
            # Words hold columns of one row, and lie one row of words after the other.
            f"{stem(name)}.qweight": words(codes, bits).T.contiguous(),
            f"{stem(name)}.qzeros": words(stored.T, bits),
            f"{stem(name)}.scales": scales.T.contiguous(),
        }
        if index:
            tensors[f"{stem(name)}.g_idx"] = order.int()
        return tensors, meant

    return pack


def awq(group: int) -> Pack:
    def interleaved(codes: Tensor) -> Tensor:
        """Output column j of eight is nibble AWQ_ORDER[j]."""
        columns = codes.view(len(codes), -1, 8)
        placed = torch.empty_like(columns)
        for j, nibble in enumerate(AWQ_ORDER):
            placed[:, :, nibble] = columns[:, :, j]
        return words(placed.reshape(len(codes), -1), 4)

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, zeros, scales, meant = asymmetric(weight, group, 4, torch.float16)
        tensors = {
            f"{stem(name)}.qweight": interleaved(codes.T.contiguous()),
            f"{stem(name)}.qzeros": interleaved(zeros.T.contiguous()),
            f"{stem(name)}.scales": scales.T.contiguous(),
        }
        return tensors, meant

    return pack


def mlx(bits: int, group: int) -> Pack:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        codes, zeros, scales, _ = asymmetric(weight, group, bits, torch.float16)
        biases = (-zeros * scales.float()).half()
        columns = weight.shape[1]
        products = codes * per_column(scales.float(), columns)
        tensors = {
            name: words(codes, bits).view(torch.uint32),
            f"{stem(name)}.scales": scales,
            f"{stem(name)}.biases": biases,
        }
        return tensors, products + per_column(biases.float(), columns)

    return pack


# --- whole checkpoints ---


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
