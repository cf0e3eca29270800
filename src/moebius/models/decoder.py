"""One decoder for training and for serving; architectures are data, in ModelConfig.

Tokens are flat (T) in both; `past` decides what they see (moebius.nn.mixer).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from moebius.models.config import LayerSpec, ModelConfig, Norms
from moebius.moe.beside import feed_forward
from moebius.moe.dispatch import LocalDispatcher
from moebius.moe.layer import FeedForward
from moebius.moe.on_host import HostExperts
from moebius.moe.ranks import ExpertRank
from moebius.moe.router import Router, Routing
from moebius.nn.linear import Changes, Embedding, Linear, ParameterModule, RMSNorm
from moebius.nn.mixer import MixerModule, Past
from moebius.nn.rope import Positions
from moebius.nn.spec import Place
from moebius.ops import Ops, Pair, PreparedLinear, Weight


class Stream(NamedTuple):
    """The residual stream scale * (x + multiplier * update), which its next reader works out."""

    x_TD: Tensor
    update_TD: Tensor | None = None
    multiplier: float = 1.0
    scale_1: Tensor | None = None


class Layer(ParameterModule):
    """What a LayerSpec describes. Its parts are named as in published checkpoints of Llama."""

    def __init__(
        self, spec: LayerSpec, place: Place, shares: ExpertRank | HostExperts | None = None
    ) -> None:
        super().__init__()
        self.ops = place.ops
        self.multiplier = spec.residual_multiplier
        self.scale: nn.Parameter | None = None
        if spec.scaled:
            self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32))

        def norm(*without: Norms) -> RMSNorm | None:
            if spec.norms in without:
                return None
            return _stream_norm(place)

        self.parallel = spec.norms == "parallel"
        self.self_attn: MixerModule | None = None
        self.mlp: FeedForward | None = None
        if spec.mixer is not None:
            self.input_layernorm = norm("post")
            self.self_attn = spec.mixer.build(place)
            self.mixer_output_norm = norm("pre", "parallel", "behind-mlp")
        if spec.feed_forward is not None:
            self.post_attention_layernorm = norm("post", "parallel")
            dispatch = shares.dispatcher(place.ops, place.layer) if shares else LocalDispatcher()
            held = shares.held(place.layer) if shares else None
            self.mlp = feed_forward(spec.feed_forward, place, dispatch, held)
            self.mlp_output_norm = norm("pre", "parallel")

    def forward(
        self, stream: Stream, positions: Positions, past: Past
    ) -> tuple[Stream, Routing | None]:
        """The residual stream behind this layer, and the routing of one that routes."""
        routing = None
        if self.self_attn is not None:
            x_TD, normed_TD = self._read(stream, self.input_layernorm)
            update_TD = self.self_attn(normed_TD, positions, past)
            if self.mixer_output_norm is not None:
                update_TD = self.mixer_output_norm(update_TD)
            stream = Stream(x_TD, update_TD, 1.0 if self.parallel else self.multiplier)
        if self.mlp is not None:
            x_TD, read_TD = self._read(stream, self.post_attention_layernorm)
            if not self.parallel:
                normed_TD = read_TD
            update_TD, routing = self.mlp(normed_TD, x_TD)
            if self.mlp_output_norm is not None:
                update_TD = self.mlp_output_norm(update_TD)
            stream = Stream(x_TD, update_TD, self.multiplier, self.scale)
        return stream, routing

    def _read(self, stream: Stream, norm: RMSNorm | None) -> Pair:
        """The residual stream, and what a part of the layer reads of it: its norm, if any."""
        if norm is not None:
            return norm.add(*stream)
        x_TD, update_TD, *_ = stream
        if update_TD is not None:
            x_TD = self.ops.add_gated(x_TD, update_TD)
        return x_TD, x_TD


def _stream_norm(place: Place) -> RMSNorm:
    sizes = place.ops, place.hidden_size, place.norm_eps
    return RMSNorm(*sizes, dtype=place.norm_dtype, less_mean=place.norm == "less-mean")


class Decoder(nn.Module):
    """Embedding, layers, norm and vocabulary projection (absent when tied to the embedding).

    Built on `device` with uninitialised parameters of `dtype`, for moebius.models.store.load or
    moebius.train.initial to fill. `ranks` is this one's part where several share the experts, and
    `host` says which of them lie in the host's memory, where `device` has one of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        ranks: ExpertRank | None = None,
        host: HostExperts | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        shares = host if ranks is None else ranks
        if shares is not None:
            shares.require(config.experts)
        self.ranks = ranks
        self.host = host
        self.dtype = dtype
        """What is computed in: biases have it, matrices may be stored in another, and norms'
        weights are as ModelConfig.norm says."""
        place = Place(ops, config.hidden_size, config.norm_eps, dtype, norm=config.norm)
        with torch.device(device):
            self.embed_tokens = Embedding(ops, config.vocab_size, config.hidden_size, dtype=dtype)
            self.layers = nn.ModuleList(
                Layer(spec, replace(place, layer=number), shares)
                for number, spec in enumerate(config.layers)
            )
            self.norm = _stream_norm(place)
            self.lm_head: Linear | None = None
            if not config.tie_word_embeddings:
                self.lm_head = Linear(ops, config.hidden_size, config.vocab_size, dtype=dtype)
        self.embedding_multiplier = config.embedding_multiplier
        if config.multiplier_rounded:
            rounded = torch.tensor(config.embedding_multiplier, dtype=dtype, device="cpu")
            self.embedding_multiplier = float(rounded)
        self._head: PreparedLinear | None = None
        self.changes = Changes()
        """How often a parameter, of whatever part, became another one or lies elsewhere."""
        for module in self.modules():
            if isinstance(module, ParameterModule):
                module.changes = self.changes

    @property
    def routers(self) -> dict[int, Router]:
        """By the number of their layers, of those that have one."""
        found = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            if layer.mlp is not None and layer.mlp.router is not None:
                found[number] = layer.mlp.router
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, past: Past
    ) -> tuple[Tensor, list[Routing | None]]:
        """Final hidden states (T, D), normed, and each layer's routing (None for a dense one)."""
        stream = Stream(self.embed_tokens(input_ids_T, self.embedding_multiplier, self.dtype))
        positions = Positions(positions_T)
        routings = []
        for layer in self.layers:
            stream, routing = layer(stream, positions, past)
            routings.append(routing)
        return self.norm.add(*stream)[1], routings

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """Logits (L, V), float32, of hidden states that forward returned."""
        head = self.head, None
        if self._head is None or not self._head.is_of(head):
            self._head = self.ops.prepare_linear(head, dtype=hidden_LD.dtype)
        return self.scaled(self.ops.logits(hidden_LD, self._head))

    @property
    def head(self) -> Weight:
        """(V, D): its products with hidden states are logits but for `scaled`."""
        return (self.lm_head or self.embed_tokens).held()

    def scaled(self, logits_LV: Tensor) -> Tensor:
        if self.config.logits_divisor != 1.0:
            logits_LV = self.ops.divide(logits_LV, self.config.logits_divisor)
        if self.config.logits_softcap is not None:
            logits_LV = self.ops.softcap(logits_LV, self.config.logits_softcap)
        return logits_LV
