"""A trained decoder as a Hugging Face directory, measured and described: what transformers, and our server, load."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moebius.models.decoder import Decoder
from moebius.models.weights import save_checkpoint
from moebius.moe.health import dead_experts, max_violation
from moebius.train.baseline import NGrams, bits_per_byte, compressed_bits_per_byte
from moebius.train.data import PreparedData
from moebius.train.evaluate import counting, scores
from moebius.train.recipe import Recipe
from moebius.train.tokenizer import IM_END, save_tokenizer, tokenizer_folder
from moebius.train.trainer import Trainer


def export(trainer: Trainer, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = trainer.data
    save_checkpoint(trainer.decoder, trainer.config_json, folder, dtype=torch.bfloat16)
    longest = trainer.decoder.config.max_position_embeddings
    save_tokenizer(data.tokenizer, folder, longest, tokenizer_folder(trainer.recipe))
    ends = [i for i in (data.end_of_text, data.tokenizer.token_to_id(IM_END)) if i is not None]
    generation = {"eos_token_id": ends, "pad_token_id": data.end_of_text}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def measure(decoder: Decoder, recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """Bits per byte of the whole held-out text by kind, beside a 5-gram's, gzip's and xz's on the same bytes.

    Compressors see all documents of a kind as one file, the model sees each row alone: the comparison favours them.
    The 5-gram model has seen the training text once. `all` has the routers' balance too, in order of layers.
    """
    length, tokenizer = recipe.training.row_length, data.tokenizer
    texts = {kind: tokenizer.decode(stream.tolist()).encode() for kind, stream in data.heldout.items()}
    texts["all"] = b"".join(texts.values())
    grams = NGrams(data.train.values(), data.vocab_size)
    nats = {kind: grams.nats(stream) for kind, stream in data.heldout.items()}
    nats["all"] = sum(nats.values())
    limited = recipe.routing.eval_capacity_factor is not None
    at_capacity = scores(decoder, data, length, at_capacity=True) if limited else {}
    with counting(decoder) as counts:
        found = scores(decoder, data, length)
    health: dict[str, Any] = {}
    if counts:
        loads = torch.stack(counts)
        worst = [round(x, 3) for x in max_violation(loads).tolist()]
        health = {"max_violation": worst, "dead_experts": int(dead_experts(loads).sum())}
    return {
        kind: {"bytes": s.num_bytes, "tokens": s.num_tokens, "bits_per_byte": s.bits_per_byte}
        | ({"bits_per_byte_at_capacity": at_capacity[kind].bits_per_byte} if limited else {})
        | {"ngram_bits_per_byte": bits_per_byte(nats[kind], s.num_bytes)}
        | compressed_bits_per_byte(texts[kind])
        | (health if kind == "all" else {})
        for kind, s in found.items()
    }


def parameter_counts(decoder: Decoder) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    total, idle = sum(p.numel() for p in decoder.parameters()), 0
    for number, part in enumerate(decoder.config.feed_forward):
        if part.router is not None:
            experts = sum(p.numel() for p in decoder.get_submodule(f"layers.{number}.mlp.experts").parameters())
            idle += experts - experts * part.router.top_k // part.router.num_experts
    return total, total - idle


def model_card(trainer: Trainer, recipe_path: str, summary: Mapping[str, Any], twin: Mapping[str, Any] | None) -> str:
    """README.md of the exported directory: data, licence, recipe, figures, and the commands that repeat them.

    `summary` is the run's figures.json; `twin` that of its dense twin, to stand beside.
    """
    recipe, facts = trainer.recipe, trainer.data.facts
    t, sizes = recipe.training, facts["sizes"]["train"]
    total, used = parameter_counts(trainer.decoder)
    name = "card.md" if recipe.model and not recipe.corpus.files else "card_own.md"
    template = Path(__file__).with_name(name).read_text(encoding="utf-8")
    health = summary["figures"]["all"]
    balance = "No layer has experts."
    if "dead_experts" in health:
        worst = ", ".join(f"{x:.2f}" for x in health["max_violation"])
        balance = f"Load over the held-out text: MaxVio {worst} by layer; dead experts: {health['dead_experts']}."
    speeds = f"{summary['tokens_per_second']:,} tokens/s"
    if twin is not None:
        speeds += f" (the dense twin: {twin['tokens_per_second']:,})"
    return template.format(
        recipe=recipe,
        t=t,
        config=trainer.decoder.config,
        layers=_layers(trainer.decoder),
        recipe_path=recipe_path,
        facts=facts,
        total=total,
        used=used,
        chats=sizes.get("chat", {}).get("documents", 0),
        seen=t.steps * t.tokens_per_step,
        minutes=trainer.seconds / 60,
        speeds=speeds,
        balance=balance,
        corpus=_corpus_table(recipe, sizes),
        measured=figures_table(summary["figures"], twin),
    )


def _layers(decoder: Decoder) -> str:
    """The feed-forward parts in one sentence."""
    parts = decoder.config.feed_forward
    sparse = [part for part in parts if part.router is not None]
    if not sparse:
        return f"dense feed-forwards of width {parts[0].width}"
    router = sparse[0].router
    assert router is not None
    where = "in every layer" if len(sparse) == len(parts) else f"in {len(sparse)} of {len(parts)} layers"
    shared = f", beside one of width {sparse[0].shared_width} that is always on" if sparse[0].shared_width else ""
    return f"{router.num_experts} experts of width {sparse[0].width} {where}, top-{router.top_k}{shared}"


def _corpus_table(recipe: Recipe, sizes: Mapping[str, Any]) -> str:
    rows = [
        (kind, size["documents"], f"{size['bytes']:,}", f"{size['tokens']:,}", recipe.mixture.get(kind, 1))
        for kind, size in sizes.items()
    ]
    return _table(("text", "documents", "bytes", "tokens", "passes an epoch"), rows)


def figures_table(figures: Mapping[str, Any], twin: Mapping[str, Any] | None = None) -> str:
    """measure's figures as a table in Markdown, those of a dense twin's run beside them."""
    heads = {"bits_per_byte": "bits per byte", "twin": "dense twin", "bits_per_byte_at_capacity": "at capacity"}
    heads |= {"ngram_bits_per_byte": "5-gram", "gzip_bits_per_byte": "gzip -9", "xz_bits_per_byte": "xz -9"}
    if twin is not None:
        figures = {kind: f | {"twin": twin["figures"][kind]["bits_per_byte"]} for kind, f in figures.items()}
    keys = [key for key in heads if key in figures["all"]]
    rows = [
        (kind, f"{f['bytes']:,}", f"**{f['bits_per_byte']:.3f}**", *(f"{f[key]:.3f}" for key in keys[1:]))
        for kind, f in figures.items()
    ]
    return _table(("held-out text", "bytes", *(heads[key] for key in keys)), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
