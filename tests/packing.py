"""Weights as the tools of Hugging Face's world quantise and pack them.

Each function packs a weight into its tensors, bit by bit in plain Python's arithmetic, and says
which numbers they stand for: worked out of the codes before they were packed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# From a weight's name and numbers to its tensors, and what these mean.
Pack = Callable[[str, Tensor], tuple[Tensors, Tensor]]

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def stem(name: str) -> str:
    return name.removesuffix(".weight")


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes along the last dimension in int32 words, the lowest bits first; the last word
    is filled up with zeros."""
    per_word = 32 // bits
    rows, columns = codes.shape
    filled = torch.nn.functional.pad(codes.long(), (0, -columns % per_word))
    shifted = filled.view(rows, -1, per_word) << (bits * torch.arange(per_word))
    unsigned = shifted.sum(-1)
    return (unsigned - ((unsigned >> 31) << 32)).to(torch.int32)


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
