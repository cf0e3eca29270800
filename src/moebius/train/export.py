"""A trained decoder as a Hugging Face directory, measured and described: what transformers, and our server, load."""

import gzip
import json
import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moebius.models.decoder import Decoder
from moebius.models.weights import save_checkpoint
from moebius.moe.health import dead_experts, max_violation
from moebius.train.data import PreparedData
from moebius.train.evaluate import scores
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import IM_END, save_tokenizer, tokenizer_folder
from moebius.train.trainer import Trainer


def export(trainer: Trainer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = trainer.data
    save_checkpoint(trainer.decoder, trainer.config_json, folder, dtype=torch.bfloat16)
    longest = trainer.decoder.config.context
    save_tokenizer(data.tokenizer, folder, longest, tokenizer_folder(trainer.recipe))
    ends = [i for i in (data.end_of_text, data.tokenizer.token_to_id(IM_END)) if i is not None]
    generation = {"eos_token_id": ends, "pad_token_id": data.end_of_text}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def measure(decoder: Decoder, recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """Bits per byte of the whole held-out text by kind, beside gzip -9's and xz -9's on the same bytes.

    Compressors see all documents of a kind as one file, the model sees each row alone: the comparison favours them.
    `all` has the routers' balance too, in order of layers.
    """
    length, tokenizer = recipe.training.row_length, data.tokenizer
    texts = {kind: tokenizer.decode(stream.tolist()).encode() for kind, stream in data.heldout.items()}
    texts["all"] = b"".join(texts.values())
    found = scores(decoder, data, length)
    figures: dict[str, dict[str, Any]] = {
        kind: {
            "bytes": s.num_bytes,
            "tokens": s.num_tokens,
            "bits_per_byte": s.bits_per_byte,
            "gzip_bits_per_byte": 8 * len(gzip.compress(texts[kind], 9)) / max(len(texts[kind]), 1),
            "xz_bits_per_byte": 8 * len(lzma.compress(texts[kind], preset=9)) / max(len(texts[kind]), 1),
        }
        for kind, s in found.items()
    }
    if recipe.routing.eval_capacity_factor is not None:
        for kind, s in scores(decoder, data, length, at_capacity=True).items():
            figures[kind]["bits_per_byte_at_capacity"] = s.bits_per_byte
    loads = found["all"].counts_SE
    if isinstance(loads, torch.Tensor):
        figures["all"]["max_violation"] = [round(x, 3) for x in max_violation(loads).tolist()]
        figures["all"]["dead_experts"] = int(dead_experts(loads).sum())
    return figures


def parameter_counts(decoder: Decoder) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    total, idle = sum(p.numel() for p in decoder.parameters()), 0
    for number, part in enumerate(decoder.config.feed_forward):
        if part.router is not None:
            experts = sum(p.numel() for p in decoder.get_submodule(f"layers.{number}.mlp.experts").parameters())
            idle += experts - experts * part.router.top_k // part.router.num_experts
    return total, total - idle


def model_card(
    template: str,
    decoder: Decoder,
    recipe: Recipe,
    facts: Mapping[str, Any],
    summary: Mapping[str, Any],
    twin: Mapping[str, Any] | None = None,
    **more: object,
) -> str:
    """README.md of the exported directory: data, recipe, figures, and the commands that repeat them.

    `facts` are the data's, `summary` is the run's figures.json, `twin` that of its dense twin, to stand beside; `more`
    is for places of the template beside those of card.md.
    """
    t, sizes, health = recipe.training, facts["sizes"]["train"], summary["figures"]["all"]
    total, used = parameter_counts(decoder)
    balance = "No layer has experts."
    if "dead_experts" in health:
        worst = ", ".join(f"{x:.2f}" for x in health["max_violation"])
        balance = f"Load over the held-out text: MaxVio {worst} by layer; dead experts: {health['dead_experts']}."
    speeds = f"{summary['tokens_per_second']:,} tokens/s"
    speeds += "" if twin is None else f" (the dense twin: {twin['tokens_per_second']:,})"
    rows = [
        (kind, size["documents"], f"{size['bytes']:,}", f"{size['tokens']:,}", recipe.mixture.get(kind, 1))
        for kind, size in sizes.items()
    ]
    return template.format(
        recipe=recipe,
        t=t,
        config=decoder.config,
        facts=facts,
        total=total,
        used=used,
        seen=t.steps * t.tokens_per_step,
        minutes=summary["seconds"] / 60,
        speeds=speeds,
        balance=balance,
        corpus=_table(("text", "documents", "bytes", "tokens", "passes an epoch"), rows),
        measured=figures_table(summary["figures"], twin),
        **more,
    )


def figures_table(figures: Mapping[str, Any], twin: Mapping[str, Any] | None = None) -> str:
    """All bits per byte in measure's figures as a table in Markdown, those of a dense twin's run beside the model's."""
    if twin is not None:
        theirs = {kind: f["bits_per_byte"] for kind, f in twin["figures"].items()}
        figures = {k: {"bits_per_byte": f["bits_per_byte"], "dense_twin": theirs[k]} | f for k, f in figures.items()}
    keys = [key for key in figures["all"] if "bits_per_byte" in key or key == "dense_twin"]
    rows = [
        (kind, f"{f['bytes']:,}", f"**{f['bits_per_byte']:.3f}**", *(f"{f[key]:.3f}" for key in keys[1:]))
        for kind, f in figures.items()
    ]
    return _table(("held-out text", "bytes", *(key.replace("_", " ") for key in keys)), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
