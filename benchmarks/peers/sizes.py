"""The sizes of the benchmark models. Those made here are Qwen3-MoE by architecture, so that every
peer runs them; of published ones see published.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from published import PUBLISHED, Published

BF16 = "bf16"
# OpenVINO's exports, by the weights that are compared: its own codes stand beside GGUF's.
OPENVINO = {BF16: "{}-ov", "q8_0": "{}-ov-int8", "q4_k_m": "{}-ov-int4"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of a decoder; `width` is one expert's hidden size, `head_dim` one attention
    head's.

    Parameters of a layer's parts are means over the layers.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    width: int
    vocab: int

    state: ClassVar[int] = 0
    """Bytes of the states of recurrent layers that a sequence has."""

    @property
    def attention(self) -> int:
        """Parameters of a layer, routers and routed experts left out."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert(self) -> int:
        """Parameters of one expert: gate, up, down."""
        return 3 * self.hidden * self.width

    @property
    def router(self) -> int:
        return self.hidden * self.experts

    @property
    def head(self) -> int:
        """Parameters of the output head, and of the embedding."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All of the products' parameters and the embedding; norms are left out."""
        return (
            self.layers * (self.attention + self.router + self.experts * self.expert)
            + 2 * self.head
        )

    def cached(self, context: float) -> float:
        """Numbers of keys and values that a row reads behind so many tokens."""
        return 2 * context * self.layers * self.kv_heads * self.head_dim

    def scores(self, context: float) -> float:
        """Operations of its scores and values."""
        return 4 * context * self.layers * self.heads * self.head_dim


MADE = {
    "m1": Sizes(8, 1024, 16, 4, 64, 32, 4, 512, 32_000),
    "m2": Sizes(24, 1024, 16, 8, 64, 32, 8, 512, 49_152),
    # OLMoE-1B-7B's numbers (arXiv 2409.02060).
    "olmoe": Sizes(16, 2048, 16, 16, 128, 64, 8, 1024, 50_304),
}
SIZES: Mapping[str, Sizes | Published] = {**MADE, **PUBLISHED}


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a layer's attention and router, of an expert, and of the head, as files hold them:
    means over the layers."""

    attention: float
    router: float
    expert: float
    head: float

    @classmethod
    def plain(cls, sizes: Sizes | Published) -> Stored:
        """In bfloat16."""
        return cls(2 * sizes.attention, 2 * sizes.router, 2 * sizes.expert, 2 * sizes.head)

    @classmethod
    def of_file(cls, sizes: Sizes | Published, file: Path) -> Stored:
        """In a GGUF file, tensor by tensor."""
        from moebius.gguf import read_gguf

        found = {name: each.stop - each.start for name, each in read_gguf(file).tensors.items()}
        inside = {name: nbytes for name, nbytes in found.items() if name.startswith("blk.")}
        router = sum(nbytes for name, nbytes in inside.items() if ".ffn_gate_inp." in name)
        routed = sum(nbytes for name, nbytes in inside.items() if "_exps." in name)
        others = sum(inside.values()) - router - routed
        return cls(
            others / sizes.layers,
            router / sizes.layers,
            routed / sizes.layers / sizes.experts,
            found.get("output.weight", found["token_embd.weight"]),
        )


def weights_of(models: Path, model: str, weights: str) -> Path:
    """Where a model's weights lie: a directory for bfloat16, else a GGUF file."""
    return models / model if weights == BF16 else models / f"{model}-{weights}.gguf"


def stored(models: Path, model: str, weights: str) -> Stored:
    sizes = SIZES[model]
    if weights == BF16:
        return Stored.plain(sizes)
    return Stored.of_file(sizes, weights_of(models, model, weights))
