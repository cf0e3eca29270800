"""Corpus, model and runs of the claims, as data: what a run changes against the first mixture of
experts.

Model: a pre-norm decoder of 4 layers, 64 wide, 2 heads, every feed-forward of two matrices with
ReLU, 128 wide; a mixture has E of them in every layer and sends a token to one, with capacity 1.25,
balance weight 0.01 and no z loss unless a run says otherwise. Its dense twin has the same
operations a token. 1,024 tokens a step, AdamW, constant learning rate after 100 steps, so that a
curve's points can be compared between runs.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebius.files import begins_with, make_directory, write_file
from moebius.moe.config import FeedForwardConfig
from moebius.moe.training import TrainingRouting
from moebius.ops.config import RouterConfig
from moebius.train.recipe import Recipe
from moebius.train.tables import CorpusRecipe, TokenizerRecipe, TrainingRecipe

# Kinds of text and their weights in the loss; training has about as much of each.
DOMAINS = {"code": 0.70, "docs": 0.15, "tables": 0.15}
BYTES = 259  # entries of a vocabulary of bytes and the three special tokens
SEEDS = (1, 2, 3)
STEPS = 2500
_CODE_BYTES = 4_000_000
_OUR_CORPUS = begins_with(b'{"text": "')


def write_corpus(folder: Path, root: Path | None = None) -> None:
    """The standard library as code (modules), docs (topics, texts) and tables (encodings)."""
    library = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    make_directory(folder)
    for domain in DOMAINS:
        lines = (json.dumps({"text": text}) for text in _texts(library, domain))
        write_file(folder / f"{domain}.jsonl", "\n".join(lines) + "\n", ours=_OUR_CORPUS)


def _texts(library: Path, domain: str) -> Iterator[str]:
    """Code stops at _CODE_BYTES, so that it has its share; long documents are cut where lines end,
    into many."""
    patterns = {
        "code": (
            "*.py",
            "asyncio/*.py",
            "email/*.py",
            "http/*.py",
            "importlib/*.py",
            "json/*.py",
            "logging/*.py",
        ),
        "docs": ("pydoc_data/topics.py", "idlelib/*.txt", "idlelib/*.html"),
        "tables": ("encodings/*.py",),
    }[domain]
    left = _CODE_BYTES
    for path in (path for pattern in patterns for path in sorted(library.glob(pattern))):
        text = path.read_text(encoding="utf-8", errors="replace")
        pieces = [text] if domain == "code" else _pieces(text)
        for piece in pieces:
            if (left := left - len(piece)) < 0:
                return
            yield piece


def _pieces(text: str, size: int = 20_000) -> Iterator[str]:
    while text:
        cut = text.rfind("\n", 0, size) + 1 or size
        yield text[:cut]
        text = text[cut:]


@dataclass(frozen=True)
class Run:
    """What a run has of its own. `experts` 0 is the dense twin; `pure`: micro-batches of one kind
    of text each."""

    experts: int = 8
    score: str = "softmax"
    selection_bias: bool = False
    dropless: bool = False
    pure: bool = False
    width: int = 64
    training: dict[str, Any] = field(default_factory=dict)


RUNS: dict[str, Run] = {
    # Rows 1, 3, 4, 7, 8 and 11 share the first two.
    "dense": Run(experts=0),
    "e8": Run(),
    "e2": Run(experts=2),
    "e4": Run(experts=4),
    "e16": Run(experts=16),
    "alpha0": Run(training={"load_balance": 0.0}),
    "alpha0.001": Run(training={"load_balance": 0.001}),
    "alpha0.1": Run(training={"load_balance": 0.1}),
    # Row 6: dropless, so that only the balance differs.
    "aux-softmax": Run(dropless=True),
    "bias-softmax-0.001": Run(
        selection_bias=True, dropless=True, training={"load_balance": 0.0, "bias_rate": 0.001}
    ),
    "bias-softmax-0.01": Run(
        selection_bias=True, dropless=True, training={"load_balance": 0.0, "bias_rate": 0.01}
    ),
    "aux-sigmoid": Run(score="sigmoid", dropless=True),
    "bias-sigmoid-0.001": Run(
        score="sigmoid",
        selection_bias=True,
        dropless=True,
        training={"load_balance": 0.0, "bias_rate": 0.001},
    ),
    "bias-sigmoid-0.01": Run(
        score="sigmoid",
        selection_bias=True,
        dropless=True,
        training={"load_balance": 0.0, "bias_rate": 0.01},
    ),
    # Row 5.
    "z0.001": Run(training={"z_loss": 0.001}),
    "z0.01": Run(training={"z_loss": 0.01}),
    "stress-z0": Run(training={"router_init": 30.0}),
    "stress-z0.001": Run(training={"router_init": 30.0, "z_loss": 0.001}),
    # Row 9.
    "local": Run(dropless=True, pure=True, training={"accumulation": 4}),
    "global": Run(dropless=True, pure=True, training={"accumulation": 4, "balance": "global"}),
    # Row 4's other half: does anything collapse without balance?
    "collapse": Run(experts=32, dropless=True, training={"load_balance": 0.0, "router_init": 30.0}),
}
PAIR_WIDTH = 128


def recipe_of(name: str, run: Run, seed: int, corpus: Path, steps: int = STEPS) -> Recipe:
    """A run as a recipe for moebius.train, over the files that `write_corpus` left."""
    router = RouterConfig(run.experts or 2, 1, run.score, "raw", run.selection_bias)  # type: ignore[arg-type]
    part = FeedForwardConfig(2 * run.width, router, "relu", gated=False)
    limits = {"dropless": False, "capacity_factor": 1.25, "eval_capacity_factor": 2.0}
    common: dict[str, Any] = {
        "steps": steps,
        "rows_per_step": 8,
        "row_length": 128,
        "learning_rate": 4e-3,
    }
    common |= {
        "warmup_steps": min(100, steps // 2),
        "final_share": 1.0,
        "weight_decay": 0.0,
        "init_scale": 1.0,
    }
    model = {
        "model_type": "moebius",
        "hidden_size": run.width,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    recipe = Recipe(
        name,
        TrainingRecipe(**common | {"z_loss": 0.0, "dtype": "float32"} | run.training),
        CorpusRecipe(
            {domain: (str(corpus / f"{domain}.jsonl"),) for domain in DOMAINS}, heldout_share=0.08
        ),
        model
        | {
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "unpublished": "experts of two matrices",
        },
        (part,),
        seed,
        tokenizer=TokenizerRecipe(BYTES),
        routing=TrainingRouting() if run.dropless or not run.experts else TrainingRouting(**limits),  # type: ignore[arg-type]
    )
    return recipe if run.experts else recipe.dense_twin()


def facts(run: Run, seed: int, steps: int) -> dict[str, Any]:
    """What identifies a run in its file."""
    return {"seed": seed, "steps": steps, **asdict(run)}
