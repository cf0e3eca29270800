"""An encoder that reads a prompt, and a decoder that answers it (T5, arXiv 1910.10683; Switch
Transformers, arXiv 2101.03961).

A step has rows of both: those of the encoder are whole prompts (SourcePast), those of the decoder
what is being written. S stands for the encoder's rows, T for the decoder's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder, Layer, Stream
from moebius.moe.dispatch import Dispatcher
from moebius.moe.experts import Experts
from moebius.moe.on_host import HostExperts
from moebius.moe.ranks import ExpertRank
from moebius.moe.router import Routing
from moebius.nn.linear import RMSNorm
from moebius.nn.mixer import Past
from moebius.nn.mixers.relative import SourceAttention, source_past
from moebius.nn.mixers.source_past import PackedSourcePast, SourceRows
from moebius.nn.packed import PackedPast
from moebius.nn.rope import Positions
from moebius.ops import Ops, StatePlan


class Prompts:
    """The encoder's rows of the pass under way: which are of which prompt."""

    plan: StatePlan = StatePlan()


class CappedDispatcher:
    """Another's, with room for so many of a prompt's tokens an expert; the output of those beyond
    is nothing: the residual stream carries them past. They are computed like the others, and weigh
    nothing."""

    def __init__(self, inner: Dispatcher, ops: Ops, capacity: int, prompts: Prompts) -> None:
        self._inner = inner
        self._ops = ops
        self._capacity = capacity
        self._prompts = prompts

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        weights_TK = self._ops.within_capacity(
            routing.weights_TK,
            routing.expert_ids_TK,
            routing.logits_TE.shape[1],
            self._capacity,
            self._prompts.plan,
        )
        return self._inner(x_TD, routing._replace(weights_TK=weights_TK), experts)


class EncoderDecoder(Decoder):
    """A Decoder of which the first layers are an encoder, with a norm of its own behind them.

    rows: what a recorded step asks the host for.
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
        super().__init__(config, ops, dtype, device, ranks, host)
        with torch.device(device):
            norm_dtype = self.norm.weight.dtype
            self.encoder_norm = RMSNorm(ops, config.hidden_size, config.norm_eps, dtype=norm_dtype)
        self.encoder_norm.changes = self.changes
        self.rows = SourceRows()
        self._prompts = Prompts()
        for layer in self._stack(encoder=True):
            router = None if layer.mlp is None else layer.mlp.router
            if layer.mlp is not None and router is not None and router.config.capacity is not None:
                capacity = router.config.capacity
                layer.mlp.dispatch = CappedDispatcher(
                    layer.mlp.dispatch, ops, capacity, self._prompts
                )

    def _stack(self, *, encoder: bool) -> list[Layer]:
        layers = [layer for layer in self.layers if isinstance(layer, Layer)]
        first = self.config.encoder_layers
        return layers[:first] if encoder else layers[first:]

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, past: Past
    ) -> tuple[Tensor, list[Routing | None]]:
        """The decoder's final hidden states (T, D), normed, and each layer's routing: of the S
        rows of the encoder in its layers, of the T rows in the decoder's."""
        known = source_past(past)
        ids_S, numbers_S = known.source(input_ids_T)
        self._prompts.plan = known.sequences()
        positions_S = Positions(numbers_S)
        encoder = self._stack(encoder=True)
        stream, routings = self._through(encoder, ids_S, positions_S, past)
        encoded_SD = self.encoder_norm.add(*stream)[1]
        decoder = self._stack(encoder=False)
        for layer in decoder:
            if isinstance(layer.self_attn, SourceAttention):
                layer.self_attn.keep(encoded_SD, positions_S, known)
        stream, others = self._through(decoder, input_ids_T, Positions(positions_T), past)
        return self.norm.add(*stream)[1], routings + others

    def _through(
        self, layers: Sequence[Layer], ids_T: Tensor, positions: Positions, past: Past
    ) -> tuple[Stream, list[Routing | None]]:
        """A stack's tokens through its layers."""
        stream = Stream(self.embed_tokens(ids_T, self.embedding_multiplier, self.dtype))
        routings = []
        for layer in layers:
            stream, routing = layer(stream, positions, past)
            routings.append(routing)
        return stream, routings


def decoder_of(
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ranks: ExpertRank | None = None,
    host: HostExperts | None = None,
) -> Decoder:
    """The module of a configuration: see Decoder."""
    kind = EncoderDecoder if config.encoder_layers else Decoder
    return kind(config, ops, dtype, device, ranks, host)


def packed_past(model: Decoder, row_length: int, document_ids_T: Tensor | None) -> PackedPast:
    """That of documents in rows (moebius.nn.packed), as this model asks for it."""
    if isinstance(model, EncoderDecoder):
        return PackedSourcePast(model.ops, row_length, document_ids_T)
    return PackedPast(row_length, document_ids_T)


def require_decoder_alone(config: ModelConfig) -> None:
    """ConfigError for an encoder and a decoder, which are not trained here."""
    if config.encoder_layers:
        raise ConfigError(
            f"{config.model_type} models are an encoder and a decoder, which are served and "
            "inspected here, and not trained"
        )
