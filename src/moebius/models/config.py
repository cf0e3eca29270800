"""An architecture as data: sizes, and for each layer what it is made of.

The records are frozen, and checked when they are constructed.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from moebius.errors import ConfigError, require_word
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.mixer import Mixer
from moebius.nn.spec import Norm, Parameter, Parameters
from moebius.ops.cache_spec import CacheSpec

Norms = Literal["pre", "sandwich", "post", "parallel", "behind-mlp"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: a mixer, a feed-forward part, or one after the other.

    norms                 `pre`: each part reads the normed residual stream. `sandwich`: what it
                          adds to the stream is normed too (Gemma 2, arXiv 2408.00118). `post`:
                          that alone is (OLMo 2, arXiv 2501.00656). `parallel`: both parts read
                          one normed stream (GPT-J). `behind-mlp`: as `pre`, and what the
                          feed-forward adds is normed too (A.X K1)
    residual_multiplier   of what each part adds to the stream; in parallel, of the feed-forward's
    scaled                the stream behind the layer is multiplied by a learned number (Gemma 4)
    """

    mixer: Mixer | None = None
    feed_forward: FeedForwardConfig | None = None
    norms: Norms = "pre"
    residual_multiplier: float = 1.0
    scaled: bool = False

    def __post_init__(self) -> None:
        require_word("a layer's norms", self.norms, Norms)
        if self.mixer is None and self.feed_forward is None:
            raise ConfigError("a layer has neither a mixer nor a feed-forward part")
        if self.norms == "parallel" and (self.mixer is None or self.feed_forward is None):
            raise ConfigError("parts are parallel where there are two")
        if self.norms == "post" and self.residual_multiplier != 1:
            raise ConfigError("residual_multiplier goes with layers whose inputs are normed")
        if self.scaled and (self.norms == "post" or self.feed_forward is None):
            raise ConfigError("a layer that is scaled has a feed-forward part behind a norm")

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of moebius.models.decoder.Layer."""
        before = self.norms != "post"
        behind = self.norms in ("sandwich", "post")
        if self.mixer is not None:
            if before:
                yield Parameter("input_layernorm.weight", (hidden_size,), norm=True)
            for parameter in self.mixer.parameters(hidden_size):
                yield parameter.within("self_attn.")
            if behind:
                yield Parameter("mixer_output_norm.weight", (hidden_size,), norm=True)
        if self.feed_forward is not None:
            if before and self.norms != "parallel":
                yield Parameter("post_attention_layernorm.weight", (hidden_size,), norm=True)
            for parameter in self.feed_forward.parameters(hidden_size):
                yield parameter.within("mlp.")
            if behind or self.norms == "behind-mlp":
                yield Parameter("mlp_output_norm.weight", (hidden_size,), norm=True)
        if self.scaled:
            yield Parameter("scale", (1,), float32=True)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A transformer as data: a decoder, or an encoder and a decoder.

    hidden_size D, vocab_size V (width of the logits)
    context        longest sequence, in tokens, that positions were made for
    layers         what each is made of
    embedding_multiplier, logits_divisor   what embeddings are multiplied by, and logits divided
    multiplier_rounded   that of embeddings is rounded to the model's dtype first (Gemma)
    norm             how an RMSNorm meets its weight: `rounded` before the product with one of the
                     model's dtype; `float32`, a weight and a product in float32 (gpt-oss); or
                     `zero-centred`, the same with a weight that checkpoints hold less 1
                     (Qwen3-Next); or `less-mean`, a layer norm with a float32 weight (Cohere)
    logits_softcap   c * tanh(logits / c), where given
    capped           why the context is shorter than what positions were made for
    longer           (n, the same layers for sequences of more than n tokens), where their rotary
                     embedding is another (longrope, arXiv 2402.13753)
    encoder_layers   the first so many layers are an encoder's, which reads the prompt; then the
                     others are a decoder's, which begins with the token start_id (T5)
    unpublished      what no published model_type has, so that the model can be trained and
                     measured, but not served
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    context: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-6
    norm: Norm = "rounded"
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    multiplier_rounded: bool = False
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    capped: str = ""
    encoder_layers: int = 0
    start_id: int = 0
    unpublished: str = ""
    longer: tuple[int, tuple[LayerSpec, ...]] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        require_word("norm", self.norm, Norm)
        if not self.norm_eps >= 0:
            raise ConfigError(
                f"norm_eps (rms_norm_eps) is {self.norm_eps}; it must not be negative"
            )
        if self.logits_divisor == 0:
            raise ConfigError("logits_divisor (logits_scaling) is 0; logits are divided by it")
        if self.logits_softcap is not None and not self.logits_softcap > 0:
            raise ConfigError(
                f"logits_softcap is {self.logits_softcap}; it must be positive, or left out"
            )
        if not self.layers:
            raise ConfigError("num_layers is 0; it must be at least 1")
        if not 0 <= self.encoder_layers < len(self.layers):
            raise ConfigError(
                f"{self.encoder_layers} of {len(self.layers)} layers are an encoder's; some must "
                "be a decoder's"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def at_length(self, tokens: int | None) -> "ModelConfig":
        """The model for sequences of up to so many tokens; None: of all that it has positions for.

        One for all of them, so that no answer depends on how long another sequence is.
        """
        if self.longer is None:
            return self
        most, layers = self.longer
        long = (self.context if tokens is None else tokens) > most
        return replace(self, layers=layers if long else self.layers, longer=None)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Those of the layers that have one, in order."""
        return tuple(layer.mixer for layer in self.layers if layer.mixer is not None)

    @property
    def feed_forward(self) -> tuple[FeedForwardConfig, ...]:
        """Those of the layers that have one, in order."""
        parts = (layer.feed_forward for layer in self.layers)
        return tuple(part for part in parts if part is not None)

    @property
    def experts(self) -> dict[int, int]:
        """How many each layer has that has a router, by the layer's number."""
        parts = enumerate(layer.feed_forward for layer in self.layers)
        return {
            number: part.router.num_experts
            for number, part in parts
            if part is not None and part.router is not None
        }

    @property
    def expert_groups(self) -> dict[int, int]:
        """In how many groups a layer's router has its experts, by the layer's number."""
        parts = enumerate(layer.feed_forward for layer in self.layers)
        return {
            number: part.router.num_groups
            for number, part in parts
            if part is not None and part.router is not None
        }

    def caches(
        self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
    ) -> tuple[CacheSpec, ...]:
        """What each layer keeps of the past, in a model of `dtype`; an empty one keeps nothing.

        kv_dtype: what keys and values are held in; None: as they are computed.
        """
        mixers = (layer.mixer for layer in self.layers)
        return tuple(
            CacheSpec() if mixer is None else mixer.cache(dtype, kv_dtype) for mixer in mixers
        )

    @property
    def attention(self) -> GQA:
        """The sizes of attention that all layers with attention share, whatever their windows.
        Raises ConfigError where they do not."""
        found = [mixer for mixer in self.mixers if isinstance(mixer, GQA)]
        sizes = {(each.num_heads, each.num_kv_heads, each.head_dim) for each in found}
        if len(sizes) != 1:
            raise ConfigError(
                f"the layers of this {self.model_type} model do not have attention of one size"
            )
        return found[0]
