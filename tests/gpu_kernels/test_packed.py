"""Instructions for pairs of numbers, read one by one: what a card makes of codes of four bits, beside
the formats' own words. Triton's interpreter has no part in this."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moebius.ops.triton.kernels import packed

Words = NDArray[np.uint32]

# OCP Microscaling Formats 1.0, table of E2M1; behind these the same below zero.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def prmt(a: Words, b: Words, selector: int) -> Words:
    """Four bytes of the eight of b and a, by the four bits that name each (PTX ISA, prmt)."""
    bytes_of = [(a >> (8 * i)) & 0xFF for i in range(4)] + [(b >> (8 * i)) & 0xFF for i in range(4)]
    chosen = [(selector >> (4 * i)) & 0xF for i in range(4)]
    assert max(chosen) < 8, "signs are not replicated here"
    return sum(
        (bytes_of[each] << np.uint32(8 * i) for i, each in enumerate(chosen)), np.zeros_like(a)
    )


def fma_of_pairs(dtype: torch.dtype) -> Callable[[Words, Words, Words], Words]:
    """a * b + c of each half, rounded once, without flushing what has no leading one."""

    def fma(*words: Words) -> Words:
        halves = [torch.from_numpy(word.view(np.int16).copy()).view(dtype) for word in words]
        a, b, c = (half.double() for half in halves)
        return (a * b + c).to(dtype).view(torch.int16).numpy().view(np.uint32)

    return fma


def run(text: str, operands: dict[int, Words]) -> dict[int, Words]:
    """What instructions make of words: operands by number, results among them."""
    registers = {f"${number}": words for number, words in operands.items()}
    shape = next(iter(operands.values()))

    def value(name: str) -> Words:
        if re.fullmatch(r"0x[0-9A-F]+|[0-9]+", name):
            return np.full_like(shape, int(name, 0))
        return registers[name]

    for line in text.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        into, *given = (each.strip() for each in rest.split(","))
        if name == "prmt.b32":
            registers[into] = prmt(value(given[0]), value(given[1]), int(given[2], 0))
        else:
            registers[into] = INSTRUCTIONS[name](*map(value, given))
    return {int(name[1:]): words for name, words in registers.items() if name.startswith("$")}


INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, by: a << by,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "fma.rn.bf16x2": fma_of_pairs(torch.bfloat16),
    "fma.rn.f16x2": fma_of_pairs(torch.float16),
}


def every_byte() -> Words:
    """Words of four bytes, each of 256 in every place."""
    first = np.arange(256, dtype=np.uint8)
    return np.stack([np.roll(first, 64 * place) for place in range(4)], 1).view(np.uint32)[:, 0]


def numbers(found: dict[int, Words], pair: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """(words, 4): of two results that hold a word's four."""
    halves = np.stack([found[each] for each in pair], 1)
    return torch.from_numpy(halves.view(np.int16).copy()).view(dtype).double()


@pytest.mark.parametrize("exponent", [0, 1, 2, 64, 119, 127, 128, 129, 200, 251, 254, 255])
def test_e2m1(exponent: int) -> None:
    """Of each byte, under a scale of two to the exponent less 127: the nearest bfloat16, which is
    the very number where there is one."""
    words = every_byte()
    bits = {0: 0x40, 255: 0x7FC0}.get(exponent, exponent << 7)
    scales = np.full_like(words, bits | bits << 16)
    found = run(packed.E2M1.value, {4: words, 5: scales, 6: scales})
    table = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float64)
    scale = float("nan") if exponent == 255 else 2.0 ** (exponent - 127)
    codes = torch.from_numpy(words.view(np.uint8).reshape(-1, 4).astype(np.int64))
    for pair, code in (((0, 1), codes & 15), ((2, 3), codes >> 4)):
        wanted = (table[code] * scale).to(torch.bfloat16)
        one = numbers(found, pair, torch.bfloat16)
        assert torch.equal(one.isnan(), wanted.isnan())
        assert torch.equal(one.nan_to_num(3.0), wanted.double().nan_to_num(3.0))
        # Zeros have their signs.
        assert torch.equal(one.signbit(), wanted.signbit()) or exponent == 255


def test_nibbles() -> None:
    words = every_byte()
    found = run(packed.NIBBLES.value, {4: words})
    codes = torch.from_numpy(words.view(np.uint8).reshape(-1, 4).astype(np.int64))
    assert torch.equal(numbers(found, (0, 1), torch.float16), (codes & 15).double())
    assert torch.equal(numbers(found, (2, 3), torch.float16), (codes >> 4).double())


def test_e4m3() -> None:
    """As torch reads them."""
    words = every_byte()
    found = numbers(run(packed.E4M3.value, {2: words}), (0, 1), torch.bfloat16)
    codes = torch.from_numpy(words.view(np.uint8).reshape(-1, 4).copy())
    wanted = codes.view(torch.float8_e4m3fn).double()
    assert torch.equal(found.abs() == 480, wanted.isnan())
    there = ~wanted.isnan()
    assert torch.equal(found[there], wanted[there])
    assert torch.equal(found.signbit(), wanted.signbit())
