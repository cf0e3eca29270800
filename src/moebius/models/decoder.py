"""One decoder for training and for serving. What differs between architectures is data, in
ModelConfig.

Tokens are flat (T) in both; `attend` decides what they see (moebius.nn.attention).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moebius.config import ModelConfig
from moebius.moe.layer import Dispatcher, FeedForward, LocalDispatcher
from moebius.moe.router import Routing
from moebius.nn.attention import Attend, Attention
from moebius.nn.linear import Linear, RMSNorm
from moebius.nn.rope import Rotary
from moebius.ops import Ops, PreparedLinear


class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then feed-forward, each added to the residual
    stream."""

    def __init__(
        self, config: ModelConfig, ops: Ops, dispatch: Dispatcher, layer: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(ops, config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = Attention(config, ops, layer, dtype)
        self.post_attention_layernorm = RMSNorm(
            ops, config.hidden_size, config.norm_eps, dtype=dtype
        )
        self.mlp = FeedForward(config.feed_forward[layer], config.hidden_size, ops, dispatch, dtype)

    def forward(
        self, x_TD: Tensor, update_TD: Tensor | None, cos_TR: Tensor, sin_TR: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """The residual stream without this layer's last update, that update, and the routing."""
        x_TD, normed_TD = self.input_layernorm.add(x_TD, update_TD, self.multiplier)
        update_TD = self.self_attn(normed_TD, cos_TR, sin_TR, attend)
        x_TD, normed_TD = self.post_attention_layernorm.add(x_TD, update_TD, self.multiplier)
        update_TD, routing = self.mlp(normed_TD)
        return x_TD, update_TD, routing


class Decoder(nn.Module):
    """Embedding, layers, norm and vocabulary projection (absent when tied to the embedding).

    Built on `device` with uninitialised parameters of `dtype`: call init_weights, or load with
    moebius.models.weights.load_decoder.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dispatch: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        dispatch = dispatch or LocalDispatcher()
        with torch.device(device):
            self.embed_tokens = nn.Embedding(
                config.vocab_size,
                config.hidden_size,
                dtype=dtype,
                _weight=torch.empty(config.vocab_size, config.hidden_size, dtype=dtype),
            )
            self.layers = nn.ModuleList(
                Layer(config, ops, dispatch, layer, dtype) for layer in range(config.num_layers)
            )
            self.norm = RMSNorm(ops, config.hidden_size, config.norm_eps, dtype=dtype)
            self.lm_head: Linear | None = None
            if not config.tie_word_embeddings:
                self.lm_head = Linear(ops, config.hidden_size, config.vocab_size, dtype=dtype)
        self._head: PreparedLinear | None = None
        # How often parameters were moved: what was recorded of them before is of others.
        self.moves = 0
        self.rotary = Rotary(config.rope, config.head_dim, ops)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        self.moves += 1
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, attend: Attend
    ) -> tuple[Tensor, list[Routing | None]]:
        """Final hidden states (T, D), after the last norm, and each layer's routing (None for a
        dense layer)."""
        x_TD = self.ops.embed(
            input_ids_T, self.embed_tokens.weight, self.config.embedding_multiplier
        )
        cos_TR, sin_TR = self.rotary(positions_T)
        update_TD, routings = None, []
        for layer in self.layers:
            x_TD, update_TD, routing = layer(x_TD, update_TD, cos_TR, sin_TR, attend)
            routings.append(routing)
        return self.norm.add(x_TD, update_TD, self.config.residual_multiplier)[1], routings

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """Logits (L, V), float32, of hidden states that forward returned."""
        weight_VD = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if self._head is None or not self._head.is_of((weight_VD, None)):
            self._head = self.ops.prepare_linear((weight_VD, None))
        logits_LV = self.ops.logits(hidden_LD, self._head)
        divisor = self.config.logits_divisor
        return logits_LV if divisor == 1.0 else self.ops.divide(logits_LV, divisor)

    @torch.no_grad()
    def init_weights(
        self,
        generator: torch.Generator | None = None,
        std: float = 0.02,
        scale: float = 0.0,
        router: float = 1.0,
    ) -> None:
        """Fresh weights: normal, cut off at 3 standard deviations (OLMoE, arXiv 2409.02060); norms
        one, biases zero.

        Projections into the residual stream (o_proj, down_proj) are narrower by sqrt(2 * layers),
        as in GPT-2. With `scale`, matrices but the embedding have sqrt(scale / inputs) instead, cut
        off at 2 (Switch, arXiv 2101.03961 section 2.4, recommends 0.1 in place of 1). `router`
        multiplies the routers' width.
        """
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                width, cut = std, 3.0
                if scale and "embed" not in name:
                    width, cut = math.sqrt(scale / parameter.shape[1]), 2.0
                elif "o_proj" in name or "down_proj" in name:
                    width = std / math.sqrt(2 * self.config.num_layers)
                width *= router if ".router." in name else 1.0
                nn.init.trunc_normal_(
                    parameter, 0.0, width, -cut * width, cut * width, generator=generator
                )
