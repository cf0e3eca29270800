"""What keys are held less where a cache holds them as codes: a constant of the model.

Keys with large biases (Qwen2) would waste most of their codes on them. A bias turns with the
position, but its slow pairs hardly do, and it is in those that large ones lie: models use them for
what matters at any distance. So what all keys have in common is a layer's bias, averaged over
positions; fast pairs average to nothing. It is of the weights and the configuration alone, never of
a request.

Shape legend: G key heads, N head size, R pairs that turn, P positions.
"""

import math

import torch
from torch import Tensor

from moebius.models.decoder import Decoder, Layer
from moebius.nn.attention import Attention
from moebius.nn.rope import RopeConfig, frequencies
from moebius.ops import Pair, Rotation

_POSITIONS = 1024


def key_offsets(decoder: Decoder) -> list[Tensor | None]:
    """What each layer's keys may be held less, (G, N) in float32; None for nothing."""
    mixers = [layer.self_attn for layer in decoder.layers if isinstance(layer, Layer)]
    return [
        _offset(mixer, decoder.config.context) if isinstance(mixer, Attention) else None
        for mixer in mixers
    ]


def _offset(attention: Attention, context: int) -> Tensor | None:
    """None where keys have no bias, or are normed behind it, which bounds them."""
    bias = None if attention.k_proj is None else attention.k_proj.bias
    if bias is None or attention.k_norm is not None:
        return None
    spec = attention.spec
    bias_GN = bias.detach().float().view(spec.num_kv_heads, spec.head_dim)
    if spec.rope is None:
        return bias_GN.clone()
    cos_1R, sin_1R = _lasting(spec.rope, spec.head_dim, context)
    rotation = Rotation(cos_1R.to(bias.device), sin_1R.to(bias.device), spec.rope.interleaved)
    return attention.ops.rotary(bias_GN.unsqueeze(0), rotation)[0].contiguous()


def _lasting(rope: RopeConfig, head_dim: int, context: int) -> Pair:
    """cos and sin (1, R), averaged over positions up to `context`: what of a turned vector stays
    where it is.

    Each order of magnitude counts alike, as do sequences of 100 tokens and of 10,000: for pairs
    that turn by less than a radian in most sequences it is 1 and 0 or close, for fast ones 0.
    """
    inverse_R, factor = frequencies(rope, head_dim)
    exponents_P = torch.linspace(0, math.log(context), _POSITIONS, dtype=torch.float64)
    angles_PR = (exponents_P.exp() - 1).unsqueeze(1) * inverse_R.double()

    def mean(x_PR: Tensor) -> Tensor:
        # Coarse enough for no other library's last bits to matter.
        coarse_1R = (x_PR.mean(0, keepdim=True) * 4096).round() / 4096
        return (coarse_1R * factor).float()

    return mean(angles_PR.cos()), mean(angles_PR.sin())
