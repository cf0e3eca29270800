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
from moebius.train.evaluate import scores
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import END_OF_TEXT, IM_END, save_tokenizer, special_id


def export(decoder: Decoder, recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(decoder, recipe.config_json(), folder, dtype=torch.bfloat16)
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
    texts = {kind: tokenizer.decode(stream.tolist()).encode() for kind, stream in heldout.items()}
    texts["all"] = b"".join(texts.values())
    return {
        kind: {
            "bytes": s.num_bytes,
            "tokens": s.num_tokens,
            "bits_per_byte": s.bits_per_byte,
            "gzip_bits_per_byte": 8 * len(gzip.compress(texts[kind], 9)) / len(texts[kind]),
            "xz_bits_per_byte": 8 * len(lzma.compress(texts[kind], preset=9)) / len(texts[kind]),
        }
        for kind, s in scores(decoder, heldout, tokenizer, recipe.training.row_length).items()
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
    t, sizes = recipe.training, facts["sizes"]["train"]
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return template.format(
        recipe=recipe,
        t=t,
        m=recipe.model,
        recipe_path=recipe_path,
        facts=facts,
        total=counts[0],
        used=counts[1],
        chats=sizes.get("chat", {}).get("documents", 0),
        seen=t.steps * t.rows_per_step * t.row_length,
        minutes=seconds / 60,
        corpus=_corpus_table(recipe, sizes),
        measured=_figures_table(figures),
    )


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
