"""Formats by their names; those of Hugging Face's directories have parameters in brackets.

`int4[128,float16]` is a format `int4` with these parameters; a backend that computes with one
computes with it whatever they are.
"""

from collections.abc import Callable
from functools import cache
from typing import cast

import torch

from moebius.ops.formats.format import Format
from moebius.ops.formats.fp8 import Fp8
from moebius.ops.formats.integers import Affine, Integers, Zeros
from moebius.ops.formats.repacked import Awq, Gptq, GptqZeros, Index, Indexed

_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")


def _dtype(name: str) -> torch.dtype:
    if name not in _SCALES:
        raise ValueError(f"scales are {', '.join(_SCALES)}, not {name}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _fp8(block: str, scale: str) -> Format:
    rows, columns = map(int, block.split("x"))
    return Fp8.of(rows, columns, _dtype(scale))


def _integers(bits: int, *, words: bool, ordered: bool = False) -> Callable[..., Format]:
    def of(group: str, scale: str, zeros: str = "none zeros") -> Format:
        kind = cast(Zeros, zeros.removesuffix(" zeros"))
        return Integers.of(
            bits, int(group), _dtype(scale), words=words, zeros=kind, ordered=ordered
        )

    return of


def _indexed(bits: int) -> Callable[..., Format]:
    def of(group: str, scale: str, zeros: str = "none zeros") -> Format:
        kind = cast(Zeros, zeros.removesuffix(" zeros"))
        return Indexed.of(bits, int(group), _dtype(scale), kind)

    return of


def _affine(bits: int) -> Callable[..., Format]:
    return lambda group, scale: Affine.of(bits, int(group), _dtype(scale))


def _gptq(bits: int) -> Callable[..., Format]:
    def of(group: str, scale: str, zeros: str, index: str) -> Format:
        kinds = cast(GptqZeros, zeros), cast(Index, index)
        return Gptq.of(bits, int(group), _dtype(scale), *kinds)

    return of


# Each takes what stands in the brackets.
_MADE: dict[str, Callable[..., Format]] = {
    "fp8": _fp8,
    "int4": _integers(4, words=True),
    "int4_ordered": _integers(4, words=True, ordered=True),
    "int4_indexed": _indexed(4),
    "int8": _integers(8, words=False),
    "int8_words": _integers(8, words=True),
    "int8_words_ordered": _integers(8, words=True, ordered=True),
    "int8_words_indexed": _indexed(8),
    "affine4": _affine(4),
    "affine8": _affine(8),
    "gptq4": _gptq(4),
    "gptq8": _gptq(8),
    "awq": lambda group, scale: Awq.of(int(group), _dtype(scale)),
}
PARAMETRIC = frozenset(_MADE) - {"int4_indexed", "int8_words_indexed", "gptq4", "gptq8", "awq"}
"""Formats with parameters that products may read, by what stands before these."""


@cache
def made(name: str) -> Format:
    """A format with parameters. Raises KeyError for an unknown name."""
    base, _, arguments = name.removesuffix("]").partition("[")
    return _MADE[base](*arguments.split(","))
