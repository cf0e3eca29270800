"""Write a GGUF file of a model's sizes whose codes are random: for models too large to be quantised
here.

    .venv/bin/python benchmarks/peers/make_gguf.py --model qwen3-30b      # 18.6 GB

Types are those of llama.cpp's Q4_K_M, tensor by tensor. Numbers have a mean of about 0 and a
deviation of about 0.02, as a trained model's. The benchmark hands over token ids, so that most of
the vocabulary are fillers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from common import peers_folder
from gguf import GGMLQuantizationType as Type
from sizes import SIZES, Sizes

# Blocks repeat after so many: nobody compresses them, and new ones would take minutes.
POOL = 2**16
BLOCK = 256


def q4_k(count: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of d * scale * q - dmin * minimum whose minimum is 7.5 times the scale: (count, 144).

    The last four of eight scales have their lower four bits in bytes of their own (K-quants'
    layout).
    """
    scales = rng.integers(24, 64, (count, 8), dtype=np.uint8)
    blocks = rng.integers(0, 256, (count, 144), dtype=np.uint8)
    d = 0.02 / (44 * 4.6)
    halves = np.array([d, 7.5 * d], np.float16).view(np.uint8)
    blocks[:, :4] = halves
    low = scales[:, 4:] & 15
    high = (scales[:, 4:] >> 4) << 6
    packed = scales[:, :4] | high
    blocks[:, 4:8] = packed
    blocks[:, 8:12] = packed
    blocks[:, 12:16] = low | (low << 4)
    return blocks


def q6_k(count: int, rng: np.random.Generator) -> np.ndarray:
    """Blocks of d * scale * (q - 32): (count, 210)."""
    blocks = rng.integers(0, 256, (count, 210), dtype=np.uint8)
    blocks[:, 192:208] = rng.integers(48, 81, (count, 16), dtype=np.uint8)
    blocks[:, 208:] = np.array([0.02 / (64 * 18.5)], np.float16).view(np.uint8)
    return blocks


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor: its shape, slowest first, and what it is stored as."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def nbytes(self) -> int:
        return gguf.quant_shape_to_byte_shape(self.shape, self.type)[-1] * int(
            np.prod(self.shape[:-1])
        )


def planned(sizes: Sizes) -> Iterator[Planned]:
    """All tensors of the qwen3moe architecture."""
    queries = sizes.heads * sizes.head_dim
    keys = sizes.kv_heads * sizes.head_dim
    hidden = sizes.hidden
    yield Planned("token_embd.weight", (sizes.vocab, hidden), Type.Q4_K)
    yield Planned("output_norm.weight", (hidden,), Type.F32)
    yield Planned("output.weight", (sizes.vocab, hidden), Type.Q6_K)
    for layer in range(sizes.layers):
        eighth = sizes.layers // 8
        more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        fine = Type.Q6_K if more else Type.Q4_K
        for name, shape, type in (
            ("attn_norm", (hidden,), Type.F32),
            ("ffn_norm", (hidden,), Type.F32),
            ("attn_q_norm", (sizes.head_dim,), Type.F32),
            ("attn_k_norm", (sizes.head_dim,), Type.F32),
            ("attn_q", (queries, hidden), Type.Q4_K),
            ("attn_k", (keys, hidden), Type.Q4_K),
            ("attn_v", (keys, hidden), fine),
            ("attn_output", (hidden, queries), Type.Q4_K),
            ("ffn_gate_inp", (sizes.experts, hidden), Type.F32),
            ("ffn_gate_exps", (sizes.experts, sizes.width, hidden), Type.Q4_K),
            ("ffn_up_exps", (sizes.experts, sizes.width, hidden), Type.Q4_K),
            ("ffn_down_exps", (sizes.experts, hidden, sizes.width), fine),
        ):
            yield Planned(f"blk.{layer}.{name}.weight", shape, type)


class Values:
    """Random numbers in each type, from pools that are drawn once."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pools = {Type.Q4_K: q4_k(POOL, self._rng), Type.Q6_K: q6_k(POOL, self._rng)}

    def of(self, tensor: Planned) -> np.ndarray:
        if tensor.type == Type.F32:
            if len(tensor.shape) == 1:
                return np.ones(tensor.shape, np.float32)
            return self._rng.normal(0, 0.02, tensor.shape).astype(np.float32)
        pool = self._pools[tensor.type]
        count = int(np.prod(tensor.shape)) // BLOCK
        rolled = np.roll(pool, int(self._rng.integers(POOL)), axis=0)
        return np.resize(rolled, (count, pool.shape[1]))


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2): itself where it is
    printed, and one from 256 on where it is not."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def describe(writer: gguf.GGUFWriter, sizes: Sizes) -> None:
    """The model's sizes and a vocabulary of the 256 bytes, one pair of them, and fillers."""
    writer.add_block_count(sizes.layers)
    writer.add_context_length(32_768)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(3 * sizes.hidden)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(sizes.top_k)
    writer.add_expert_feed_forward_length(sizes.width)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    letters = byte_letters()
    tokens = [*letters, letters[32] + "a"]
    tokens += [f"<filler {number}>" for number in range(len(tokens), sizes.vocab)]
    normal = gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([normal] * 257 + [gguf.TokenType.UNUSED] * (sizes.vocab - 257))
    writer.add_token_merges([f"{letters[32]} a"])
    writer.add_eos_token_id(sizes.vocab - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=SIZES)
    parser.add_argument("--out", type=Path, help="default: PEERS/models/MODEL-q4_k_m.gguf")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = SIZES[given.model]
    out = given.out or peers_folder() / "models" / f"{given.model}-q4_k_m.gguf"
    writer = gguf.GGUFWriter(out, "qwen3moe")
    describe(writer, sizes)
    tensors = list(planned(sizes))
    for tensor in tensors:
        plain = tensor.type == Type.F32
        shape = tensor.shape if plain else gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
        dtype = np.dtype(np.float32 if plain else np.uint8)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = Values(given.seed)
    for tensor in tensors:
        writer.write_tensor_data(values.of(tensor))
    writer.close()
    print(f"{out}: {out.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
