"""Noise that training adds before a choice of experts, and serving never: T tokens, E experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.moe.share import WHOLE_BATCH, BatchShare


def jittered(x_TD: Tensor, eps: float, share: BatchShare = WHOLE_BATCH) -> Tensor:
    """The router's input times uniform(1 - eps, 1 + eps), in float32; the experts' stays as it is.

    So in Mesh TensorFlow's code; the paper's figure 15 adds the noise to the logits, ST-MoE says it
    multiplies them.
    """
    wide_TD = x_TD.float()
    return wide_TD * share.drawn(wide_TD, lambda noise: noise.uniform_(1 - eps, 1 + eps))


def noisy(logits_TE: Tensor, width_TE: Tensor, share: BatchShare = WHOLE_BATCH) -> Tensor:
    """Logits plus normal noise as wide as softplus(width) (arXiv 1701.06538 eq 4)."""
    return logits_TE + share.drawn(logits_TE, torch.Tensor.normal_) * F.softplus(width_TE)
