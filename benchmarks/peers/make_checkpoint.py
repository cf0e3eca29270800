"""Write a benchmark model in the Hugging Face layout: seeded random bfloat16 weights and a
byte-level BPE tokenizer.

    python make_checkpoint.py --model m1 [--out PEERS/models]

Weights are drawn and written one shard at a time, so a model of 14 GB takes 3 GB of memory. Needs
torch, safetensors and transformers. The tokenizer is trained on Python's standard library;
benchmarks hand over token ids, it is there because engines ask for one.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from common import peers_folder
from safetensors.torch import save_file
from sizes import MADE, Sizes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SHARD_BYTES = 2 * 2**30
STANDARD_DEVIATION = 0.02
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
)


def config(sizes: Sizes) -> dict[str, object]:
    """config.json under the names that transformers 4 and 5, vLLM, OpenVINO and llama.cpp's
    converter all read."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 3,
        "decoder_sparse_step": 1,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": STANDARD_DEVIATION,
        "intermediate_size": 4 * sizes.width,
        "max_position_embeddings": 4096,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.width,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes.vocab,
    }


def shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name in the checkpoint and its shape, in the order of the layers."""
    hidden = sizes.hidden
    query = sizes.heads * sizes.head_dim
    kv = sizes.kv_heads * sizes.head_dim
    yield "model.embed_tokens.weight", (sizes.vocab, hidden)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        for name, shape in (
            ("q", (query, hidden)),
            ("k", (kv, hidden)),
            ("v", (kv, hidden)),
            ("o", (hidden, query)),
        ):
            yield f"{prefix}.self_attn.{name}_proj.weight", shape
        yield f"{prefix}.self_attn.q_norm.weight", (sizes.head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (sizes.head_dim,)
        yield f"{prefix}.mlp.gate.weight", (sizes.experts, hidden)
        for expert in range(sizes.experts):
            for name in ("gate", "up"):
                yield f"{prefix}.mlp.experts.{expert}.{name}_proj.weight", (sizes.width, hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, sizes.width)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (sizes.vocab, hidden)


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * STANDARD_DEVIATION).to(torch.bfloat16)


def shards(sizes: Sizes) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in groups of at most SHARD_BYTES each."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes(sizes):
        size = 2 * math.prod(shape)
        if filled + size > SHARD_BYTES and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += size
    return groups


def write_weights(sizes: Sizes, out: Path, seed: int) -> int:
    """Draw and write shard by shard; returns the number of parameters."""
    generator = torch.Generator().manual_seed(seed)
    groups = shards(sizes)
    parameters = 0
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        tensors = {name: draw(name, shape, generator) for name, shape in group}
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    if len(groups) > 1:
        written = {"metadata": {"total_size": 2 * parameters}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(written, indent=1))
    return parameters


def write_tokenizer(vocab: int, out: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    # Every id must decode, also those that the training text was too short for.
    tokenizer.add_tokens([f"<unused{i}>" for i in range(vocab - tokenizer.get_vocab_size())])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=SPECIAL[3]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(out)


def _texts() -> Iterator[str]:
    for file in sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/**/*.py", recursive=True)):
        if "site-packages" not in file:
            try:
                yield Path(file).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # the standard library's tests hold files in other encodings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=MADE)
    parser.add_argument("--out", type=Path, help="folder of the models (default: PEERS/models)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = MADE[given.model]
    out = (given.out or peers_folder() / "models") / given.model
    out.mkdir(parents=True, exist_ok=True)
    parameters = write_weights(sizes, out, given.seed)
    write_tokenizer(sizes.vocab, out)
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3})
    )
    (out / "config.json").write_text(json.dumps(config(sizes), indent=2) + "\n")
    print(f"{out}: {parameters:,} parameters, {2 * parameters / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
