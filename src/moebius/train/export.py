"""A trained decoder as a Hugging Face directory: what transformers, and this project's own server, load."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from moebius.models.decoder import Decoder
from moebius.models.weights import save_checkpoint
from moebius.train.evaluate import Score, score
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import END_OF_TEXT, IM_END, save_tokenizer, special_id


def config_json(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of the recipe's model, as transformers' Qwen3MoeForCausalLM reads it."""
    m = recipe.model
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": m.hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "vocab_size": recipe.tokenizer.vocab_size,
        "max_position_embeddings": m.max_position_embeddings,
        "rope_theta": m.rope_theta,
        "rms_norm_eps": recipe.model_config().norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "moe_intermediate_size": m.expert_width,
        "intermediate_size": m.expert_width * m.experts_per_token,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": recipe.training.load_balance,
        "initializer_range": m.init_std,
        "use_sliding_window": False,
        "eos_token_id": special_id(tokenizer, END_OF_TEXT),
        "pad_token_id": special_id(tokenizer, END_OF_TEXT),
    }


def export(decoder: Decoder, recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(recipe, tokenizer)
    save_checkpoint(decoder, config, folder, dtype=torch.bfloat16)
    save_tokenizer(tokenizer, folder, recipe.model.max_position_embeddings)
    generation = {
        "eos_token_id": [special_id(tokenizer, END_OF_TEXT), special_id(tokenizer, IM_END)],
        "pad_token_id": special_id(tokenizer, END_OF_TEXT),
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def measure(decoder: Decoder, recipe: Recipe, heldout: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, Any]:
    """Bits per byte of the whole held-out text, beside gzip's and xz's on the same bytes.

    Compressors see all documents of a kind as one file, the model sees each row alone: the comparison favours them.
    """
    length = recipe.training.row_length
    scores: dict[str, Score] = {}
    texts: dict[str, bytes] = {}
    for kind, stream in heldout.items():
        scores[kind] = score(decoder, stream, tokenizer, length)
        texts[kind] = tokenizer.decode(stream.tolist(), skip_special_tokens=True).encode()
    first, *rest = scores.values()
    scores["all"], texts["all"] = sum(rest, first), b"".join(texts.values())
    return {
        kind: {
            "bytes": s.num_bytes,
            "tokens": s.num_tokens,
            "bits_per_byte": s.bits_per_byte,
            "gzip_bits_per_byte": 8 * len(gzip.compress(texts[kind], 9)) / len(texts[kind]),
            "xz_bits_per_byte": 8 * len(lzma.compress(texts[kind], preset=9)) / len(texts[kind]),
        }
        for kind, s in scores.items()
    }


def parameter_counts(decoder: Decoder, experts: int, chosen: int) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    total = sum(p.numel() for p in decoder.parameters())
    in_experts = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
    return total, total - in_experts + in_experts * chosen // experts


def model_card(
    recipe: Recipe,
    recipe_path: str,
    facts: dict[str, Any],
    figures: dict[str, Any],
    counts: tuple[int, int],
    seconds: float,
) -> str:
    """README.md of the exported directory: data, licence, recipe, figures, and the commands that repeat them."""
    t, m, sizes = recipe.training, recipe.model, facts["sizes"]["train"]
    seen = t.steps * t.rows_per_step * t.row_length
    corpus, measured = _corpus_table(recipe, sizes), _figures_table(figures)
    return f"""---
license: psf-2.0
library_name: moebius
pipeline_tag: text-generation
---
# {recipe.name}

A small Mixture-of-Experts language model of Python code, trained by this project from scratch on a CPU, so that the
server has a real model to serve out of the box. It continues Python in plausible shapes and knows nothing else; its
names, facts and logic are not to be relied on, and decoded greedily it often repeats itself (try temperature 0.7).

- `qwen3_moe`, {counts[0]:,} parameters, of which a token uses {counts[1]:,}; bfloat16.
- {m.num_layers} layers of width {m.hidden_size}, {m.num_heads} query and {m.num_kv_heads} key heads of {m.head_dim};
  {m.num_experts} experts of width {m.expert_width} a layer, top-{m.experts_per_token}; tied embeddings.
- Byte-level BPE of {recipe.tokenizer.vocab_size:,} entries, trained on the training text alone. A newline and the
  indentation after it are mostly one token, so that a prompt goes on better when it ends in visible text than in a
  newline: `class Stack:`, not `class Stack:\\n`.
- Trained on rows of {t.row_length} tokens. Positions up to {m.max_position_embeddings} are accepted, but the model has
  seen no longer context and gets worse beyond it.

## Data and licence
The standard library of Python {facts["python_version"]} as it is installed, help topics of `pydoc_data` included, and
{sizes.get("chat", {}).get("documents", 0):,} short conversations made from it by rule (`moebius/train/chat.py`), in
which the chat template occurs. The text is under the PSF License Agreement, version 2 (PSF-2.0), © Python Software
Foundation; the weights are distributed under the same licence. SHA-256 of the corpus:
`{facts["corpus_sha256"]}`.

{corpus}

About {recipe.corpus.heldout_share:.1%} of the documents, chosen by a hash of their path, were held out whole, less
those that share a fifth of their five-line windows with a training document.

## Training
{seen:,} tokens in {t.steps:,} steps of {t.rows_per_step} × {t.row_length} tokens, {seconds / 60:.0f} minutes on 2 CPU
cores; AdamW, peak learning rate {t.learning_rate:g}, bfloat16 compute on float32 master weights, router in float32;
load-balance loss {t.load_balance:g}, router z-loss {t.z_loss:g}. To repeat it: `moebius train {recipe_path} --out DIR`.

## Figures
Cross-entropy in bfloat16 as exported, in rows of {t.row_length} tokens, over the bytes of the text; compressors see
each kind as one file.

{measured}

To repeat them: `moebius train {recipe_path} --out DIR --evaluate-only`, where DIR holds this model.
"""


def _corpus_table(recipe: Recipe, sizes: dict[str, Any]) -> str:
    return _table(
        ("text", "documents", "bytes", "tokens", "passes an epoch"),
        (
            (kind, size["documents"], f"{size['bytes']:,}", f"{size['tokens']:,}", getattr(recipe.mixture, kind))
            for kind, size in sizes.items()
        ),
    )


def _figures_table(figures: dict[str, Any]) -> str:
    return _table(
        ("held-out text", "bytes", "bits per byte", "gzip -9", "xz -9"),
        (
            (
                kind,
                f"{f['bytes']:,}",
                f"**{f['bits_per_byte']:.3f}**",
                f"{f['gzip_bits_per_byte']:.3f}",
                f"{f['xz_bits_per_byte']:.3f}",
            )
            for kind, f in figures.items()
        ),
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
