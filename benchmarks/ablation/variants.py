"""What is taken away, and what all variants are measured on: requests, twins, cache memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebius.bench.workload import Sample, require_positive
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.engine.prepared import Prepared
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.family import model_config
from moebius.models.store import open_checkpoint
from moebius.models.store.save import save_checkpoint
from moebius.moe.config import FeedForwardConfig
from moebius.train.initial import init_weights

MAX_MODEL_LEN = 1024
FULL = "full engine"
CONTIGUOUS = "contiguous reservation"


@dataclass(frozen=True, slots=True)
class Variant:
    """What is different from the full engine.

    config    fields of EngineConfig
    cached    keep keys and values from token to token; else each token is a new request of all
              tokens before it
    batching  join and leave at any step; else a batch starts when the whole previous one is
              finished
    twin      a dense model with random weights, with the size of all experts ("total") or of those
              that a token uses ("active")
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = True
    batching: bool = True
    twin: str = ""


def variants(config: EngineConfig) -> dict[str, Variant]:
    """All comparisons by name, the full engine first.

    Contiguous reservation is one block a sequence, as long as the longest allowed; what cannot be
    split cannot be shared, so it has no prefix cache either. A static batch is treated kindly: it
    has no padding, and its tokens count when they are computed, not when the batch ends. Without
    chunked prefill a step must hold the longest prompt.
    """
    longest = config.max_model_len
    assert longest is not None
    unchunked = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(longest, config.max_num_batched_tokens),
    }
    return {
        FULL: Variant(),
        "no KV cache": Variant({"enable_prefix_caching": False}, cached=False),
        CONTIGUOUS: Variant({"block_size": longest}),
        "static batching": Variant(batching=False),
        "no chunked prefill": Variant(unchunked),
        "no prefix cache": Variant({"enable_prefix_caching": False}),
        "dense: equal total": Variant(twin="total"),
        "dense: equal active": Variant(twin="active"),
    }


def settle(
    directory: Path, config: EngineConfig, num_prompts: int
) -> tuple[EngineConfig, Prepared]:
    """Fill in what depends on the model.

    max_model_len is the model's context, at most MAX_MODEL_LEN; the KV cache holds as many
    sequences of that length as a quarter of max_num_seqs.
    """
    context = open_checkpoint(directory).config.context
    length = config.max_model_len or min(MAX_MODEL_LEN, context)
    queue = max(num_prompts, config.max_queue_requests)
    config = replace(config, max_model_len=length, max_queue_requests=queue)
    prepared = prepare(directory, config)
    if config.kv_cache_memory_bytes is None:
        sequences = max(config.max_num_seqs // 4, 1)
        cache = sequences * length * prepared.plan.bytes_per_token
        config = replace(config, kv_cache_memory_bytes=cache)
    return config, prepared


def dense_width(model: ModelConfig, twin: str) -> int:
    """Width of the dense feed-forward of a twin; the mean where layers differ."""

    def width(part: FeedForwardConfig) -> int:
        if part.router is None:
            return part.width
        experts = part.router.num_experts if twin == "total" else part.router.top_k
        return experts * part.width + part.shared_width

    widths = [width(part) for part in model.feed_forward]
    return round(sum(widths) / len(widths))


def write_twin(prepared: Prepared, twin: str, directory: Path) -> None:
    """A qwen3 checkpoint with the model's sizes, a dense feed-forward and random weights.

    They come from a fixed seed.
    """
    model = prepared.checkpoint.config
    config_json = {
        "model_type": "qwen3",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "num_key_value_heads": model.attention.num_kv_heads,
        "head_dim": model.attention.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "intermediate_size": dense_width(model, twin),
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    decoder = Decoder(model_config(config_json), prepared.ops, prepared.dtype)
    init_weights(decoder, torch.Generator().manual_seed(0))
    save_checkpoint(decoder, config_json, directory)


def mixed_samples(
    count: int, *, vocab_size: int, max_model_len: int, seed: int = 0
) -> list[Sample]:
    """Requests of which, in every eight, four share a prefix, three are short and one is long.

    They come in random order. With M = max_model_len the prefix is M / 4 tokens and followed by up
    to M / 16 own ones; short prompts have M / 64 to M / 8, long ones M / 2 to 5 M / 8; answers
    M / 128 to M / 8, log-uniform: most are short, some are not.
    """
    require_positive(num_prompts=count)
    rng = np.random.default_rng(seed)
    m = max_model_len
    prefix = rng.integers(0, vocab_size, m // 4).tolist()
    # For each kind what its prompts begin with, and the least and most tokens of their own.
    sharing = (prefix, m // 128, m // 16)
    short = ([], m // 64, m // 8)
    long = ([], m // 2, m * 5 // 8)
    kinds = [sharing] * 4 + [short] * 3 + [long]
    samples = []
    for kind in rng.permutation([i % 8 for i in range(count)]).tolist():
        shared, low, high = kinds[kind]
        length = rng.integers(max(low, 1), high, endpoint=True)
        own = rng.integers(0, vocab_size, length).tolist()
        answer = round(math.exp(rng.uniform(math.log(max(m / 128, 2)), math.log(m / 8))))
        samples.append(Sample((*shared, *own), len(shared) + len(own), answer))
    return samples
