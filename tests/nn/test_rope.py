"""Rotary frequencies against transformers' own functions, and rotation against complex
multiplication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moebius.errors import ConfigError
from moebius.nn.rope import RopeConfig, Rotary, frequencies
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps

LONG = {"factor": 8.0, "original_max_position_embeddings": 256}
CASES: list[tuple[RopeConfig, dict[str, Any]]] = [
    (RopeConfig(5e5, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    (RopeConfig(5e5, "llama3", 8.0, 256, 1.0, 4.0),
     {"rope_type": "llama3", **LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    (RopeConfig(5e5, "llama3", 8.0, 256, 2.0, 3.5),
     {"rope_type": "llama3", **LONG, "low_freq_factor": 2.0, "high_freq_factor": 3.5}),
    (RopeConfig(5e5, "yarn", 8.0, 256), {"rope_type": "yarn", **LONG}),
    (RopeConfig(5e5, "yarn", 8.0, 256, attention_factor=1.3), {"rope_type": "yarn", **LONG, "attention_factor": 1.3}),
    (RopeConfig(5e5, "yarn", 8.0, 256, mscale=0.7, mscale_all_dim=1.1),
     {"rope_type": "yarn", **LONG, "mscale": 0.7, "mscale_all_dim": 1.1}),
    (RopeConfig(5e5, "yarn", 8.0, 256, beta_fast=16.0, beta_slow=2.0, truncate=False),
     {"rope_type": "yarn", **LONG, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}),
    (RopeConfig(5e5, "yarn", 1.0, 256), {"rope_type": "yarn", **LONG, "factor": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize(
    ("ours", "theirs"), CASES, ids=[f"{c[0].scaling}-{i}" for i, c in enumerate(CASES)]
)
def test_frequencies_equal_transformers(
    ours: RopeConfig, theirs: dict[str, Any], head_dim: int
) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5e5, **theirs},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"))
    inverse, attention_factor = frequencies(ours, head_dim)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    "ops", [ReferenceOps(), select_ops("cpu", torch.float32)], ids=lambda ops: ops.name
)
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_complex_multiplication(partial: float, interleaved: bool, ops: Ops) -> None:
    head_dim, theta = 8, 100.0
    rotated = int(head_dim * partial)
    rope = RopeConfig(theta, partial=partial, interleaved=interleaved)
    rotation = Rotary(rope, head_dim, ops)(torch.tensor([0, 1, 7, 1000]))
    x = torch.randn(4, 3, head_dim)
    out = ops.rotary(x, rotation)
    half = rotated // 2
    for t, position in enumerate((0, 1, 7, 1000)):
        for i in range(half):
            turn = torch.polar(
                torch.tensor(1.0), torch.tensor(position * theta ** (-2 * i / rotated))
            )
            real, imaginary = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            pair = torch.complex(x[t, :, real], x[t, :, imaginary]) * turn
            torch.testing.assert_close(out[t, :, real], pair.real, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out[t, :, imaginary], pair.imag, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[..., rotated:], x[..., rotated:])


def test_divisors_divide_the_frequencies() -> None:
    divisors = (1.0, 1.0, 3.5, 8.0)
    inverse, _ = frequencies(RopeConfig(100.0, divisors=divisors), 8)
    expected = [100.0 ** (-2 * i / 8) / divisor for i, divisor in enumerate(divisors)]
    torch.testing.assert_close(inverse, torch.tensor(expected), rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="4 divisors of frequencies; 3 pairs turn"):
        frequencies(RopeConfig(100.0, divisors=divisors), 6)
