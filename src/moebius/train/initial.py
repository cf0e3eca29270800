"""A decoder's weights before the first step of training."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moebius.models.decoder import Decoder


def initial_weights(
    decoder: Decoder,
    generator: torch.Generator | None = None,
    std: float = 0.02,
    scale: float = 0.0,
    router: float = 1.0,
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and value, one at a time; the decoder's own may be on meta, and stay.

    Normal, cut off at 3 standard deviations (OLMoE, arXiv 2409.02060); norms and scales one, biases
    zero. Projections into the residual stream (o_proj, down_proj) are narrower by sqrt(2 * layers),
    as in GPT-2. With `scale`, matrices but the embedding have sqrt(scale / inputs) instead, cut off
    at 2 (Switch, arXiv 2101.03961 section 2.4, recommends 0.1 in place of 1). `router` multiplies
    the routers' width.
    """
    for name, parameter in decoder.named_parameters():
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        if "norm" in name or name.endswith("scale"):
            value.fill_(1.0)
        elif parameter.ndim == 1:
            value.zero_()
        else:
            width = std
            cut = 3.0
            if scale and "embed" not in name:
                width = math.sqrt(scale / parameter.shape[1])
                cut = 2.0
            elif "o_proj" in name or "down_proj" in name:
                width = std / math.sqrt(2 * decoder.config.num_layers)
            width *= router if ".router." in name else 1.0
            nn.init.trunc_normal_(value, 0.0, width, -cut * width, cut * width, generator=generator)
        yield name, value


@torch.no_grad()
def init_weights(
    decoder: Decoder, generator: torch.Generator | None = None, std: float = 0.02
) -> None:
    """Give a decoder its initial weights."""
    parameters = dict(decoder.named_parameters())
    for name, value in initial_weights(decoder, generator, std):
        parameters[name].copy_(value)
