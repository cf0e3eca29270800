"""Noise that training adds before a choice of experts, and serving never: T tokens, E experts."""

import torch
import torch.nn.functional as F
from torch import Tensor


def jittered(x_TD: Tensor, eps: float) -> Tensor:
    """The router's input times uniform(1 - eps, 1 + eps), in float32; the experts' stays as it is.

    So in Mesh TensorFlow's code; the paper's figure 15 adds the noise to the logits, ST-MoE says it
    multiplies them.
    """
    return x_TD.float() * torch.empty(x_TD.shape, device=x_TD.device).uniform_(1 - eps, 1 + eps)


def noisy(logits_TE: Tensor, width_TE: Tensor) -> Tensor:
    """Logits plus normal noise as wide as softplus(width) (arXiv 1701.06538 eq 4)."""
    return logits_TE + torch.randn_like(logits_TE) * F.softplus(width_TE)
