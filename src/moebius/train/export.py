"""A trained decoder as a Hugging Face directory, measured and described: what transformers, and our
server, load."""

import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebius.errors import ConfigError, require
from moebius.files import anyone, json_text, make_directory, read_json, write_file
from moebius.models.decoder import Decoder
from moebius.models.hub import BUNDLED
from moebius.models.store.save import save_checkpoint
from moebius.moe.health import dead_experts, max_violation
from moebius.train.data import PreparedData
from moebius.train.evaluate import scores
from moebius.train.recipe import Recipe
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
    """Write config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer's
    files.

    What is fine-tuned keeps what its checkpoint says beside weights: how it ends and samples, its
    terms of use.
    """
    make_directory(folder)
    data, base = trainer.data, trainer.recipe.base()
    save_checkpoint(trainer.decoder, trainer.config_json, folder, dtype=torch.bfloat16)
    longest = trainer.decoder.config.context
    save_tokenizer(data.tokenizer, folder, longest, trainer.recipe.given_tokenizer())
    if base is not None:
        copy_files(base, folder, _CARRIED)
    says_how_it_ends = base is not None and (base / "generation_config.json").exists()
    if not says_how_it_ends and (base is None or trainer.config_json.get("eos_token_id") is None):
        ends = [i for i in (data.end_of_text, data.tokenizer.token_to_id(IM_END)) if i is not None]
        generation = {"eos_token_id": ends, "pad_token_id": data.end_of_text}
        write_file(
            folder / "generation_config.json", json_text(generation, indent=2) + "\n", ours=anyone
        )


def would_replace(recipe: Recipe, folder: Path) -> list[str]:
    """What is in `folder` already of the names that an export and its card have, and weights under
    any name: whoever loads a directory takes the shards that an index beside them names."""
    base = recipe.base()
    carried = [] if base is None else matching(base, _CARRIED)
    names = [Path("README.md"), Path("config.json"), Path("generation_config.json"), *carried]
    names += tokenizer_files(recipe.given_tokenizer()) + matching(folder, ("*.safetensors*",))
    return sorted({str(name) for name in names if (folder / name).exists()})


def measure(decoder: Decoder, recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """Bits per byte of the whole held-out text by kind, beside gzip -9's and xz -9's on the same
    bytes.

    Compressors see all documents of a kind as one file, the model sees each row alone: the
    comparison favours them. `all` has the routers' balance too, in order of layers.
    """
    length = recipe.training.row_length
    found = scores(decoder, data, length)
    figures: dict[str, dict[str, Any]] = {}
    for kind, s in found.items():
        streams = list(data.heldout.values()) if kind == "all" else [data.heldout[kind]]
        figures[kind] = {
            "bytes": s.num_bytes,
            "tokens": s.num_tokens,
            "bits_per_byte": s.bits_per_byte,
        }
        figures[kind] |= _compressed(_texts(streams, data.token_bytes))
    if recipe.routing.eval_capacity_factor is not None:
        for kind, s in scores(decoder, data, length, at_capacity=True).items():
            figures[kind]["bits_per_byte_at_capacity"] = s.bits_per_byte
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
    sizes, total = dict.fromkeys(made, 0), 0
    for text in texts:
        total += len(text)
        for name, compressor in made.items():
            sizes[name] += len(compressor.compress(text))
    return {
        f"{name}_bits_per_byte": 8 * (sizes[name] + len(made[name].flush())) / max(total, 1)
        for name in made
    }


def parameter_counts(decoder: Decoder) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    total, idle = sum(p.numel() for p in decoder.parameters()), 0
    for number, router in decoder.routers.items():
        held = decoder.get_submodule(f"layers.{number}.mlp.experts").parameters()
        experts = sum(p.numel() for p in held)
        idle += experts - experts * router.config.top_k // router.config.num_experts
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
    """README.md of the exported directory: data, recipe, figures, and the commands that repeat
    them.

    `facts` are the data's, `summary` is the run's figures.json, `twin` that of its dense twin, to
    stand beside; `more` is for places of the template beside those of card.md.
    """
    t, sizes, health = recipe.training, facts["sizes"]["train"], summary["figures"]["all"]
    total, used = parameter_counts(decoder)
    balance = "No layer has experts."
    if "dead_experts" in health:
        worst = ", ".join(f"{x:.2f}" for x in health["max_violation"])
        balance = (
            f"Load over the held-out text: MaxVio {worst} by layer; dead experts: "
            f"{health['dead_experts']}."
        )
    speeds = f"{summary['tokens_per_second']:,} tokens/s"
    speeds += "" if twin is None else f" (the dense twin: {twin['tokens_per_second']:,})"
    rows = [
        (
            kind,
            size["documents"],
            f"{size['bytes']:,}",
            f"{size['tokens']:,}",
            recipe.mixture.get(kind, 1),
        )
        for kind, size in sizes.items()
    ]
    head, origin = _origin(recipe)
    return template.format(
        head=head,
        origin=origin,
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


def _origin(recipe: Recipe) -> tuple[str, str]:
    """What a card's head and text say of the checkpoint that was fine-tuned: its licence, its
    name."""
    base, start = recipe.base(), recipe.finetune
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
    origin = (
        f"- Fine-tuned from `{base.name if local else start.checkpoint}`: {what[start.train]}.\n"
    )
    return "".join(f"{line}\n" for line in head), origin


def read_twin(out: Path, data: PreparedData) -> dict[str, Any]:
    """The figures of a dense twin's run. Raises ConfigError where there are none, or not of this
    held-out text."""
    path = out / "training" / "figures.json"
    found = read_json(path)
    figures, speed = found.get("figures"), found.get("tokens_per_second")
    if not isinstance(figures, dict) or not isinstance(speed, int | float):
        raise ConfigError(f"--against {out}: {path} holds no figures of a training run")
    for kind in (*data.heldout, "all"):
        theirs = figures.get(kind)
        measured = isinstance(theirs, dict) and isinstance(theirs.get("bits_per_byte"), int | float)
        require(
            measured,
            f"--against {out}: no figures of held-out {kind} text; its twin trains on the same "
            "corpus",
        )
    return found


def figures_table(figures: Mapping[str, Any], twin: Mapping[str, Any] | None = None) -> str:
    """All bits per byte in measure's figures as a table in Markdown, those of a dense twin's run
    beside the model's."""
    if twin is not None:
        theirs = {kind: f["bits_per_byte"] for kind, f in twin["figures"].items()}
        figures = {
            k: {"bits_per_byte": f["bits_per_byte"], "dense_twin": theirs[k]} | f
            for k, f in figures.items()
        }
    keys = [key for key in figures["all"] if "bits_per_byte" in key or key == "dense_twin"]
    rows = [
        (
            kind,
            f"{f['bytes']:,}",
            f"**{f['bits_per_byte']:.3f}**",
            *(f"{f[key]:.3f}" for key in keys[1:]),
        )
        for kind, f in figures.items()
    ]
    return _table(("held-out text", "bytes", *(key.replace("_", " ") for key in keys)), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
