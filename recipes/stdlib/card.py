"""The bundled model's card: its figures beside a 5-gram model's over the same tokens, and beside
its dense twin's.

    .venv/bin/python recipes/stdlib/card.py DIR [--twin TWIN]

writes README.md into DIR, which `moebius train recipes/bundled.toml --out DIR` has filled, TWIN
with --dense-twin; what they measured is read from DIR/training and TWIN/training. The twin's run
may have ended early.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moebius import LLM, SamplingParams
from moebius.errors import ConfigError, MoebiusError
from moebius.files import anyone, write_file
from moebius.models.store.load import load_decoder
from moebius.ops.reference import ReferenceOps
from moebius.train.data import PreparedData, holds_run, prepare
from moebius.train.export import model_card
from moebius.train.recipe import Recipe, read_recipe

ORDER = 5
PROMPTS = ("def read_file(path):", "class Stack:", "# The cache")
SAMPLE_TOKENS = 64


class NGrams:
    """An interpolated n-gram model with Witten-Bell weights (Chen and Goodman 1998, section 2.5).

    P_n(w | h) = (c(h w) + N(h) P_{n-1}(w | shorter h)) / (c(h) + N(h)), where N(h) counts the
    distinct words that followed h; below the unigrams all of the vocabulary is equally likely.
    """

    def __init__(self, streams: Iterable[np.ndarray], vocab_size: int) -> None:
        tokens = np.concatenate([np.asarray(stream, np.int64) for stream in streams])
        self._vocab = vocab_size
        # Grams of each order as sorted keys: (number of the gram without its last word) times the
        # vocabulary's size, plus the last word.
        self._keys: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        prefix = np.zeros(len(tokens), np.int64)
        for n in range(1, ORDER + 1):
            key = prefix[: len(tokens) - n + 1] * vocab_size + tokens[n - 1 :]
            keys, prefix, counts = np.unique(key, return_inverse=True, return_counts=True)
            self._keys.append(keys)
            self._counts.append(counts)

    def nats(self, stream: np.ndarray) -> float:
        """-sum ln P of every token but the first, each given up to ORDER - 1 before it."""
        tokens = np.asarray(stream, np.int64)
        probability = np.full(len(tokens), 1 / self._vocab)
        for n in range(1, min(ORDER, len(tokens)) + 1):
            found, context = self._find(tokens, n)
            totals, kinds = self._followers(n)
            seen = np.where(context >= 0, totals[context], 0)
            new = np.where(context >= 0, kinds[context], 0)
            count = np.where(found >= 0, self._counts[n - 1][found], 0)
            at = slice(n - 1, None)
            with np.errstate(invalid="ignore"):
                mixed = (count + new * probability[at]) / (seen + new)
            probability[at] = np.where(seen > 0, mixed, probability[at])
        return float(-np.log(probability[1:]).sum())

    def _find(self, tokens: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position from n - 1 on: the number of the n-gram that ends there and of its
        context; -1 unseen."""
        number = context = np.zeros(len(tokens), np.int64)
        for m in range(1, n + 1):
            context = number[: len(tokens) - n + 1] if m == n else number
            key = context * self._vocab + tokens[m - 1 : m - 1 + len(context)]
            keys = self._keys[m - 1]
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            number = np.where((context >= 0) & (keys[place] == key), place, -1)
            number = number[: len(tokens) - m] if m < n else number
        return number, context

    def _followers(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each context of n - 1 words: how many words followed it, and how many distinct."""
        contexts = self._keys[n - 1] // self._vocab
        size = 1 if n == 1 else len(self._keys[n - 2])
        return np.bincount(contexts, self._counts[n - 1], size), np.bincount(
            contexts, minlength=size
        )


def with_ngrams(figures: dict[str, Any], data: PreparedData) -> dict[str, Any]:
    """The figures of a run, with the 5-gram's bits per byte: it has seen the training text once."""
    grams = NGrams(data.train.values(), data.vocab_size)
    nats = {kind: grams.nats(stream) for kind, stream in data.heldout.items()}
    nats["all"] = sum(nats.values())
    return {
        kind: f | {"5_gram_bits_per_byte": nats[kind] / max(f["bytes"], 1) / math.log(2)}
        for kind, f in figures.items()
    }


def beside_twin(out: Path, twin: Path) -> str:
    """A table of both runs' held-out bits per byte, as far as the shorter one went."""
    mine = _lines(out / "training" / "metrics.jsonl")
    theirs = _lines(twin / "training" / "metrics.jsonl")
    speed = median(line["tokens_per_second"] for line in mine.values())
    their_speed = median(line["tokens_per_second"] for line in theirs.values())
    key = "heldout_bits_per_byte"
    rows = []
    for step in mine:
        if key in mine[step] and key in theirs.get(step, {}):
            rows.append((step, mine[step][key]["all"], theirs[step][key]["all"]))
    return "\n".join(
        [
            "Beside its dense twin, which has as many parameters as a token uses here and saw the "
            "same batches at the",
            f"same learning rates ({max(theirs):,} steps of it), in bits a byte of a part of the "
            "held-out text. Median",
            f"speed of training on one CPU core, beside other work at times: {speed:,.0f} and "
            f"{their_speed:,.0f} tokens/s.",
            "",
            "| step | mixture of experts | dense twin |",
            "| --- | --- | --- |",
            *(f"| {step:,} | {_marked(a, a < b)} | {_marked(b, b < a)} |" for step, a, b in rows),
        ]
    )


def _marked(value: float, better: bool) -> str:
    return f"**{value:.3f}**" if better else f"{value:.3f}"


def _lines(path: Path) -> dict[int, dict[str, Any]]:
    return {
        line["step"]: line
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    }


def samples(out: Path) -> str:
    """What the model makes of PROMPTS, as code blocks."""
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=SAMPLE_TOKENS)
    with LLM(str(out), kv_cache_memory_bytes=2**24) as llm:
        outputs = llm.generate(PROMPTS, params, progress=False)
    return "\n\n".join(f"```\n{output.prompt}{output.outputs[0].text}\n```" for output in outputs)


def card(recipe: Recipe, out: Path, data: PreparedData, twin: Path | None = None) -> str:
    """README.md of the model in `out`."""
    summary = json.loads((out / "training" / "figures.json").read_text())
    summary["figures"] = with_ngrams(summary["figures"], data)
    decoder = load_decoder(out, torch.bfloat16, ops=ReferenceOps())
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return model_card(
        template,
        decoder,
        recipe,
        data.facts,
        summary,
        chats=data.facts["sizes"]["train"]["chat"]["documents"],
        python=platform.python_version(),
        experts=decoder.config.feed_forward[0],
        sample_tokens=SAMPLE_TOKENS,
        samples=samples(out),
        beside="" if twin is None else beside_twin(out, twin),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the bundled model's card.")
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument(
        "--twin", type=Path, metavar="TWIN", help="where its dense twin was trained"
    )
    given = parser.parse_args(arguments)
    # The card of a directory that a run filled is the run's, which this one replaces.
    if not holds_run(given.out / "training" / "data"):
        raise ConfigError(f"{given.out} holds no training run; name the --out of one")
    recipe = read_recipe(Path(__file__).parents[1] / "bundled.toml")
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(recipe, Path(folder), tokenizer=given.out)
        text = card(recipe, given.out, data, given.twin)
    write_file(given.out / "README.md", text, ours=anyone)


if __name__ == "__main__":
    try:
        main()
    except MoebiusError as error:
        sys.exit(f"card.py: {error}")
