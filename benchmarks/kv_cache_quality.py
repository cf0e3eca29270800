"""What an int8 KV cache costs: bits per byte of text, and how far the distributions move.

    .venv/bin/python benchmarks/kv_cache_quality.py --json benchmarks/kv_cache_quality.json

Two models read the same text through a paged cache: the bundled one, and a small one with large key
biases, as Qwen2's, which is trained here for some minutes from a start that has them. The text is
this repository's own sources, which neither has seen. Beside the cache in what is computed
(bfloat16) stand int8, and int8 whose keys are held less nothing. `kl` is the mean divergence of a
token's distribution from that with the unquantised cache, in nats.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moebius
from moebius.engine.kv_cache import KVCache
from moebius.engine.workspace import forward
from moebius.inspect.corpus import read_documents
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.key_offsets import key_offsets
from moebius.models.store.load import load_decoder
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.packed import PackedPast
from moebius.nn.rope import RopeConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.text import Tokenizer
from moebius.train.initial import init_weights
from records import processor, save

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = Path(moebius.__file__).parent / "bundled"
BLOCK = 16
CONTEXT = 2048
HEADS = 2
HEAD_DIM = 64
BIASED = ModelConfig(
    model_type="qwen2",
    hidden_size=128,
    vocab_size=4096,
    context=CONTEXT,
    layers=(
        LayerSpec(
            GQA(2 * HEADS, HEADS, HEAD_DIM, rope=RopeConfig(theta=1e6), qkv_bias=True),
            FeedForwardConfig(384),
        ),
    )
    * 2,
    tie_word_embeddings=True,
)
ROW = 128
BATCH = 4


def texts(
    paths: Sequence[Path], tokenizer: Tokenizer, tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Rows of up to CONTEXT tokens of the documents, and their bytes; `tokens` in all."""
    for document in read_documents(paths, tokens):
        ids = tokenizer.encode(document.text)
        for start in range(0, len(ids), CONTEXT):
            row = ids[start : start + CONTEXT]
            if tokens < len(row) or len(row) < 2:
                continue
            tokens -= len(row)
            yield row, len(tokenizer.decode(row[1:]).encode())


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder, ids: Sequence[int], kv_dtype: torch.dtype, offsets: Sequence[Tensor | None]
) -> Tensor:
    """(T, V) of each token's next, float32, through a cache of its own."""
    blocks = -(-len(ids) // BLOCK)
    specs = decoder.config.caches(decoder.dtype, kv_dtype)
    device = torch.device("cpu")
    cache = KVCache(
        specs, decoder.ops, num_blocks=blocks, block_size=BLOCK, device=device, key_offsets=offsets
    )
    step = StepInputs.build([list(ids)], [0], [list(range(blocks))], BLOCK)
    return torch.log_softmax(decoder.logits(forward(decoder, cache, step)), dim=-1)


def compare(
    name: str, decoder: Decoder, rows: Sequence[tuple[list[int], int]]
) -> list[dict[str, Any]]:
    """Bits per byte with each cache, and divergence from the first."""
    dtype = decoder.dtype
    ways: dict[str, tuple[torch.dtype, Sequence[Tensor | None]]] = {
        str(dtype).removeprefix("torch."): (dtype, ()),
        "int8": (torch.int8, key_offsets(decoder)),
        "int8, nothing subtracted": (torch.int8, ()),
    }
    nats = dict.fromkeys(ways, 0.0)
    divergence = dict.fromkeys(ways, 0.0)
    tokens = sum(len(ids) - 1 for ids, _ in rows)
    for ids, _ in rows:
        plain = None
        for way, (kv_dtype, offsets) in ways.items():
            found = log_probabilities(decoder, ids, kv_dtype, offsets)[:-1]
            plain = found if plain is None else plain
            nats[way] -= found.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).double().sum().item()
            divergence[way] += (plain.exp() * (plain - found)).double().sum().item()
    num_bytes = sum(count for _, count in rows)
    first = next(iter(nats.values()))
    return [
        {
            "model": name,
            "cache": way,
            "bits_per_byte": round(each / num_bytes / math.log(2), 5),
            "perplexity": round(math.exp(each / tokens), 4),
            "more": f"{each / first - 1:+.4%}",
            "kl": float(f"{divergence[way] / tokens:.3g}"),
            "tokens": tokens,
        }
        for way, each in nats.items()
    ]


def biased_model(tokenizer: Tokenizer, steps: int) -> Decoder:
    """BIASED after some steps of training on the standard library, in bfloat16.

    Its key biases begin at 60 to 120 in four slow pairs of each head, those of Qwen2's size.
    """
    torch.manual_seed(0)
    decoder = Decoder(BIASED, ReferenceOps())
    init_weights(decoder)
    for layer in decoder.layers:
        bias_GN = layer.self_attn.k_proj.bias.data.view(HEADS, HEAD_DIM)  # type: ignore[union-attr]
        for head in range(HEADS):
            pairs = torch.randint(HEAD_DIM // 4, HEAD_DIM // 2, (4,))
            angles = 2 * math.pi * torch.rand(4)
            sizes = 60 + 60 * torch.rand(4)
            bias_GN[head, pairs] = sizes * angles.cos()
            bias_GN[head, pairs + HEAD_DIM // 2] = sizes * angles.sin()
    library = Path(sysconfig.get_path("stdlib"))
    rows = [row for row, _ in texts([*sorted(library.glob("*.py"))], tokenizer, 200_000)]
    ids = torch.tensor([token for row in rows for token in row])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.0)
    positions = torch.arange(ROW).repeat(BATCH)
    start = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - ROW - 1, (BATCH,)).tolist()
        given = torch.cat([ids[at : at + ROW] for at in starts])
        wanted = torch.cat([ids[at + 1 : at + ROW + 1] for at in starts])
        hidden, _ = decoder(given, positions, PackedPast(ROW))
        loss = F.cross_entropy(decoder.logits(hidden), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 50 == 49:
            print(
                f"step {step + 1}: {loss.item():.2f} nats, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    served = Decoder(BIASED, CpuOps(2), torch.bfloat16)
    served.load_state_dict(decoder.state_dict())
    return served.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / "src", ROOT / "tests"])
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(BUNDLED)
    rows = list(texts(args.text, tokenizer, args.tokens))
    bundled = load_decoder(BUNDLED, torch.bfloat16, ops=CpuOps(2))
    found = compare("bundled", bundled, rows)
    if args.steps:
        found += compare("large key biases", biased_model(tokenizer, args.steps), rows)
    for row in found:
        print(row)
    save(args.json, {"processor": processor(), "kernels": bundled.ops.name, "rows": found})


if __name__ == "__main__":
    main()
