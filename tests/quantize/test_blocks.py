"""Quantisers beside gguf-py's, and beside searches that try everything."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.ops.formats import FORMATS
from moebius.quantize.encode import ENCODERS, encoded

# Those that gguf-py quantises too.
THEIRS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")


def theirs(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def widened(name: str, found: Tensor) -> Tensor:
    return FORMATS[name].widened((found,), torch.float32)


def numbers(rows: int = 24, columns: int = 512, seed: int = 0) -> Tensor:
    """Rows of very different sizes, some of zeros, some of one sign, some with an outlier."""
    x_RK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x_RK *= torch.logspace(-5, 2, rows).unsqueeze(1)
    x_RK[0] = 0
    x_RK[1] = x_RK[1].abs()
    x_RK[2] = -x_RK[2].abs()
    x_RK[3] = x_RK[3, 0]
    x_RK[4, ::37] *= 50
    x_RK[5, 32:] = 0
    x_RK[6, :32] = torch.arange(-16, 16) / 4  # halves between codes
    return x_RK


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bytes_are_gguf_pys(name: str, dtype: torch.dtype) -> None:
    x_RK = numbers().to(dtype)
    with np.errstate(all="ignore"):  # its 1 / d of a block of zeros
        wanted = gguf.quants.quantize(x_RK.float().numpy(), theirs(name))
    assert np.array_equal(encoded(x_RK, name).numpy(), wanted)


@pytest.mark.parametrize("name", ENCODERS)
def test_gguf_py_reads_what_is_made(name: str) -> None:
    """And so do our formats; what is read is near what it was made of."""
    x_RK = numbers()
    found = encoded(x_RK, name)
    read = torch.from_numpy(gguf.quants.dequantize(found.numpy(), theirs(name)).copy())
    assert torch.equal(read, widened(name, found))
    # A block's error is bounded by its largest number, in steps of the format: see LARGEST.
    blocks = (-1, FORMATS[name].elements)  # type: ignore[attr-defined]
    largest = x_RK.view(blocks).abs().amax(1)
    wrong = (read - x_RK).view(blocks).abs().amax(1)
    assert bool((wrong <= largest * LARGEST[name] + SMALLEST).all())


# What is too small for float16 scales of 128 units of 32 steps.
SMALLEST = 2**-25 * 128 * 32
# How far any number may be off, as a share of its block's largest: half a step, and what rounding
# the scales adds. K-quants weigh small numbers less, and their scales are integers of few bits.
LARGEST = {
    "q8_0": 0.5 / 127 + 2**-10,
    "q4_0": 1 / 8 + 2**-10,
    "q5_0": 1 / 16 + 2**-10,
    "q4_1": 2 / 15 * 0.5 + 2**-9,
    "q5_1": 2 / 31 * 0.5 + 2**-9,
    "mxfp4": 0.26,
    "iq4_nl": 0.1,
    "iq4_xs": 0.1,
    "q2_k": 0.4,
    "q3_k": 0.2,
    "q4_k": 0.08,
    "q5_k": 0.04,
    "q6_k": 0.03,
}


@pytest.mark.parametrize(
    ("name", "most"),
    [("iq4_nl", 0.0765), ("q2_k", 0.285), ("q3_k", 0.162), ("q4_k", 0.0735), ("q5_k", 0.0365),
     ("q6_k", 0.0184), ("iq4_xs", 0.0772)],
)  # fmt: skip
def test_errors_of_normal_numbers_are_what_careful_searches_reach(name: str, most: float) -> None:
    """Root mean square, relative; a plain rounding to the block's range has a tenth more."""
    x_RK = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 0.02
    wrong = widened(name, encoded(x_RK, name)) - x_RK
    assert float(wrong.norm() / x_RK.norm()) < most


def best_scale(x_P: Tensor, values: Tensor) -> float:
    """The least weighted error (weights x^2) that any scale of a fine grid gives."""
    largest = float(x_P.abs().max())
    scales = torch.linspace(0.3, 1.7, 4001).unsqueeze(1) * largest / 113
    scales = torch.cat((scales, -scales))
    wrong_GP = ((x_P / scales).unsqueeze(-1) - values).abs().amin(-1) * scales
    return float((wrong_GP.square() * x_P.square()).sum(1).min())


def test_the_scale_of_iq4_nl_is_nearly_the_best_there_is() -> None:
    x_RK = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    from moebius.ops.formats.blocks_of_32 import IQ4_VALUES

    wrong = (widened("iq4_nl", encoded(x_RK, "iq4_nl")) - x_RK) * x_RK
    best = [best_scale(row, torch.tensor(IQ4_VALUES, dtype=torch.float32)) for row in x_RK]
    assert float(wrong.square().sum()) <= 1.01 * sum(best)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    x_RK = numbers(columns=256)
    whole = encoded(x_RK, name)
    for row in range(len(x_RK)):
        assert torch.equal(encoded(x_RK[row : row + 1], name)[0], whole[row])


def test_numbers_of_the_format_come_back() -> None:
    """What Q8_0, Q4_0 and MXFP4 have read, they write again, the same."""
    for name in ("q8_0", "q4_0", "mxfp4"):
        once = widened(name, encoded(numbers(), name))
        assert torch.equal(widened(name, encoded(once, name)), once), name


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -70000.0])
def test_numbers_without_a_scale_are_refused(number: float) -> None:
    x_RK = torch.zeros(2, 256)
    x_RK[1, 7] = number
    with pytest.raises(WeightsError, match="no scale for"):
        encoded(x_RK, "q4_k")


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole blocks"):
        encoded(torch.zeros(2, 128), "q6_k")
