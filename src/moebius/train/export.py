"""A trained decoder as a Hugging Face directory, measured and described."""

import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.files import anyone, json_text, make_directory, read_json, write_file
from moebius.models.decoder import Decoder
from moebius.models.hub import BUNDLED
from moebius.models.store.save import save_checkpoint
from moebius.moe.health import dead_experts, max_violation
from moebius.train.data import PreparedData
from moebius.train.evaluate import scores
from moebius.train.recipe import Recipe
from moebius.train.sharing import Sharing
from moebius.train.tokenizer import IM_END, copy_files, matching, save_tokenizer, tokenizer_files
from moebius.train.trainer import Trainer

# What a checkpoint has beside weights, config.json, tokenizer and card.
_CARRIED = (
    "generation_config.json",
    "custom_generate/*",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    "*.py",
)
# Held-out tokens whose text is in memory at a time.
_TOKENS = 2**16


def export(trainer: Trainer, folder: Path) -> None:
    """Write the directory that transformers, and our server, load; weights are bfloat16.

    What is fine-tuned keeps what its checkpoint says beside weights: how it ends and samples, its
    terms of use. All ranks ask, rank 0 writes.
    """
    weights = trainer.weights()
    trainer.ranks.lead(lambda: _write(trainer, weights, folder))


def _write(trainer: Trainer, weights: Mapping[str, Tensor], folder: Path) -> None:
    make_directory(folder)
    data = trainer.data
    base = trainer.recipe.base()
    save_checkpoint(weights, trainer.config_json, folder, dtype=torch.bfloat16)
    longest = trainer.decoder.config.context
    save_tokenizer(data.tokenizer, folder, longest, trainer.recipe.given_tokenizer())
    if base is not None:
        copy_files(base, folder, _CARRIED)
    says_how_it_ends = base is not None and (base / "generation_config.json").exists()
    if not says_how_it_ends and (base is None or trainer.config_json.get("eos_token_id") is None):
        ends = [data.end_of_text]
        turn_end = data.tokenizer.token_to_id(IM_END)
        if turn_end is not None:
            ends.append(turn_end)
        generation = {"eos_token_id": ends, "pad_token_id": data.end_of_text}
        text = json_text(generation, indent=2) + "\n"
        write_file(folder / "generation_config.json", text, ours=anyone)


def would_replace(recipe: Recipe, folder: Path) -> list[str]:
    """What is in `folder` already of the names that an export and its card have.

    Weights count under any name: whoever loads a directory takes the shards that an index names.
    """
    base = recipe.base()
    carried = [] if base is None else matching(base, _CARRIED)
    names = [Path("README.md"), Path("config.json"), Path("generation_config.json"), *carried]
    names += tokenizer_files(recipe.given_tokenizer()) + matching(folder, ("*.safetensors*",))
    return sorted({str(name) for name in names if (folder / name).exists()})


def measure(
    decoder: Decoder, recipe: Recipe, data: PreparedData, sharing: Sharing | None = None
) -> dict[str, Any]:
    """Bits per byte of the held-out text by kind, beside gzip -9's and xz -9's on the same bytes.

    Compressors see all documents of a kind as one file, the model sees each row alone: the
    comparison favours them. `all` has the routers' balance too, in order of layers.
    """
    length = recipe.training.row_length
    found = scores(decoder, data, length, sharing=sharing)
    figures: dict[str, dict[str, Any]] = {}
    for kind, score in found.items():
        streams = list(data.heldout.values()) if kind == "all" else [data.heldout[kind]]
        figures[kind] = {
            "bytes": score.num_bytes,
            "tokens": score.num_tokens,
            "bits_per_byte": score.bits_per_byte,
            **_compressed(_texts(streams, data.token_bytes)),
        }
    if recipe.routing.eval_capacity_factor is not None:
        limited = scores(decoder, data, length, at_capacity=True, sharing=sharing)
        for kind, score in limited.items():
            figures[kind]["bits_per_byte_at_capacity"] = score.bits_per_byte
    loads = found["all"].counts_SE
    if isinstance(loads, torch.Tensor):
        figures["all"]["max_violation"] = [round(x, 3) for x in max_violation(loads).tolist()]
        figures["all"]["dead_experts"] = int(dead_experts(loads).sum())
    return figures


def _texts(streams: Iterable[np.ndarray], token_bytes: Sequence[bytes]) -> Iterator[bytes]:
    """The text that the streams' tokens stand for, some at a time."""
    for stream in streams:
        for start in range(0, len(stream), _TOKENS):
            yield b"".join(token_bytes[i] for i in stream[start : start + _TOKENS].tolist())


def _compressed(texts: Iterable[bytes]) -> dict[str, float]:
    """What gzip -9 and xz -9 make of the texts, as one file, in bits a byte."""
    # 31: the largest window, and gzip's header and trailer.
    made: dict[str, Any] = {
        "gzip": zlib.compressobj(9, wbits=31),
        "xz": lzma.LZMACompressor(preset=9),
    }
    sizes = dict.fromkeys(made, 0)
    total = 0
    for text in texts:
        total += len(text)
        for name, compressor in made.items():
            sizes[name] += len(compressor.compress(text))
    figures = {}
    for name, compressor in made.items():
        size = sizes[name] + len(compressor.flush())
        figures[f"{name}_bits_per_byte"] = 8 * size / max(total, 1)
    return figures


def parameter_counts(decoder: Decoder) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    total = sum(p.numel() for p in decoder.parameters())
    idle = 0
    for number, part in enumerate(decoder.config.feed_forward):
        if part.router is not None:
            module = decoder.get_submodule(f"layers.{number}.mlp.experts")
            experts = sum(p.numel() for p in module.parameters())
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
    """README.md of the exported directory: data, recipe, figures, and how to repeat them.

    `facts` are the data's, `summary` is the run's figures.json, `twin` that of its dense twin, to
    stand beside; `more` is for places of the template beside those of card.md.
    """
    training = recipe.training
    total, used = parameter_counts(decoder)
    speeds = f"{summary['tokens_per_second']:,} tokens/s"
    if twin is not None:
        speeds += f" (the dense twin: {twin['tokens_per_second']:,})"
    head, origin = _origin(recipe)
    return template.format(
        head=head,
        origin=origin,
        recipe=recipe,
        t=training,
        config=decoder.config,
        facts=facts,
        total=total,
        used=used,
        seen=training.steps * training.tokens_per_step,
        minutes=summary["seconds"] / 60,
        speeds=speeds,
        balance=_balance(summary["figures"]["all"]),
        corpus=_corpus_table(facts["sizes"]["train"], recipe.mixture),
        measured=figures_table(summary["figures"], twin),
        **more,
    )


def _balance(figures: Mapping[str, Any]) -> str:
    """A sentence on the experts' load over the held-out text."""
    if "dead_experts" not in figures:
        return "No layer has experts."
    worst = ", ".join(f"{x:.2f}" for x in figures["max_violation"])
    dead = figures["dead_experts"]
    return f"Load over the held-out text: MaxVio {worst} by layer; dead experts: {dead}."


def _corpus_table(sizes: Mapping[str, Mapping[str, int]], mixture: Mapping[str, int]) -> str:
    rows = []
    for kind, size in sizes.items():
        passes = mixture.get(kind, 1)
        rows.append((kind, size["documents"], f"{size['bytes']:,}", f"{size['tokens']:,}", passes))
    return _table(("text", "documents", "bytes", "tokens", "passes an epoch"), rows)


def _origin(recipe: Recipe) -> tuple[str, str]:
    """What a card's head and text say of the checkpoint that was fine-tuned: licence and name."""
    base = recipe.base()
    start = recipe.finetune
    if base is None or start is None:
        return "", ""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    head = [line for line in front.splitlines() if re.match(r"license(_name|_link)?:", line)]
    local = start.checkpoint == BUNDLED or Path(start.checkpoint).expanduser().is_dir()
    if not local:
        head.append(f"base_model: {start.checkpoint}")
    what = {
        "all": "all of its parameters",
        "experts": "its experts",
        "all_but_experts": "all but its experts",
    }
    name = base.name if local else start.checkpoint
    origin = f"- Fine-tuned from `{name}`: {what[start.train]}.\n"
    return "".join(f"{line}\n" for line in head), origin


def read_twin(out: Path, data: PreparedData) -> dict[str, Any]:
    """The figures of a dense twin's run.

    Raises ConfigError where there are none, or not of this held-out text.
    """
    path = out / "training" / "figures.json"
    found = read_json(path)
    figures = found.get("figures")
    speed = found.get("tokens_per_second")
    if not isinstance(figures, dict) or not isinstance(speed, int | float):
        raise ConfigError(f"--against {out}: {path} holds no figures of a training run")
    for kind in (*data.heldout, "all"):
        theirs = figures.get(kind)
        if not isinstance(theirs, dict) or not isinstance(theirs.get("bits_per_byte"), int | float):
            raise ConfigError(
                f"--against {out}: no figures of held-out {kind} text; its twin trains on the same "
                "corpus"
            )
    return found


def figures_table(figures: Mapping[str, Any], twin: Mapping[str, Any] | None = None) -> str:
    """All bits per byte in measure's figures as a table in Markdown.

    Those of a dense twin's run stand beside the model's.
    """
    keys = [key for key in figures["all"] if "bits_per_byte" in key]
    columns = [key.replace("_", " ") for key in keys]
    if twin is not None:
        columns.insert(1, "dense twin")
    rows = []
    for kind, figure in figures.items():
        values = [f"{figure[key]:.3f}" for key in keys]
        values[0] = f"**{values[0]}**"
        if twin is not None:
            values.insert(1, f"{twin['figures'][kind]['bits_per_byte']:.3f}")
        rows.append((kind, f"{figure['bytes']:,}", *values))
    return _table(("held-out text", "bytes", *columns), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
