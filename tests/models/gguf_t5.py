"""The same of T5: an encoder's blocks and a decoder's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
from torch import Tensor

from models.gguf_writing import ARCHITECTURES, SUFFIXES, Converter

ARCHITECTURES["t5"] = "T5"
# Of the tokenizer's model, as the converter finds them in SentencePiece's.
UNKNOWN = "<unk>"
CONTROL = ("<pad>", "</s>")
# What transformers calls an embedding that it may hold three times.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


class T5Converter(Converter):
    """One Hugging Face directory of T5 into one file."""

    @property
    def depth(self) -> int:
        encoder: int = self.config["num_layers"]
        return max(encoder, self.config["num_decoder_layers"])

    def keys(self, w: gguf.GGUFWriter) -> None:
        c = self.config
        w.add_context_length(c.get("n_positions", 512))
        w.add_embedding_length(c["d_model"])
        w.add_feed_forward_length(c["d_ff"])
        w.add_block_count(c["num_layers"])
        w.add_decoder_block_count(c["num_decoder_layers"])
        w.add_head_count(c["num_heads"])
        w.add_key_length(c["d_kv"])
        w.add_value_length(c["d_kv"])
        w.add_layer_norm_eps(c["layer_norm_epsilon"])
        w.add_relative_attn_buckets_count(c["relative_attention_num_buckets"])
        w.add_layer_norm_rms_eps(c["layer_norm_epsilon"])
        w.add_decoder_start_token_id(c["decoder_start_token_id"])

    def rope_freqs(self, writer: gguf.GGUFWriter) -> None:
        """Nothing turns."""

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        if name in COPIES:
            return []
        place = self.names.get_name(name, SUFFIXES)
        assert place is not None, name
        return [(tensor, place)]

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        return parts[0] if parts else self.tensors[name]


def tokenizer_keys(directory: Path) -> Callable[[gguf.GGUFWriter], None]:
    """The keys of a directory's Unigram tokenizer; sentinels are what pads a vocabulary."""
    pieces = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    sentinels = [i for i, (piece, _) in enumerate(pieces) if piece.startswith("<extra_id_")]

    def kind(i: int, piece: str) -> gguf.TokenType:
        if i in sentinels:
            return gguf.TokenType.UNUSED
        unknown = gguf.TokenType.UNKNOWN if piece == UNKNOWN else gguf.TokenType.NORMAL
        return gguf.TokenType.CONTROL if piece in CONTROL else unknown

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        names = [f"[PAD{i}]" if i in sentinels else piece for i, (piece, _) in enumerate(pieces)]
        writer.add_token_list(names)
        writer.add_token_scores([-1e4 if i in sentinels else s for i, (_, s) in enumerate(pieces)])
        writer.add_token_types([kind(i, piece) for i, (piece, _) in enumerate(pieces)])
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(2)
        writer.add_pad_token_id(0)

    return add
