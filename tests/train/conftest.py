"""A small standard library (some real modules, two help topics) and a recipe that trains on it in
seconds."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from moebius.train.data import PreparedData, prepare
from moebius.train.recipe import Recipe
from moebius.train.tables import CorpusRecipe, TokenizerRecipe, TrainingRecipe
from stdlib.prepare import read_library, write

MODULES = (
    "abc bisect calendar cmd code contextlib copy csv dis fnmatch glob heapq io keyword numbers "
    "operator pprint queue random reprlib sched shlex string textwrap timeit token"
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shaped like a standard library."""
    root = tmp_path_factory.mktemp("library")
    source = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES.split():
        shutil.copy(source / f"{name}.py", root / f"{name}.py")
    (root / "pydoc_data").mkdir()
    topics = {
        "assert": "Assert\n\nAssert statements are a convenient way to insert\nchecks.",
        "if": "If",
    }
    (root / "pydoc_data" / "topics.py").write_text(
        f"# made\ntopics = {topics!r}\n", encoding="utf-8"
    )
    return root


@pytest.fixture(scope="session")
def text(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as the recipes read it."""
    folder = tmp_path_factory.mktemp("text")
    write(read_library(0.05, library), folder, chats=40)
    return folder


@pytest.fixture(scope="session")
def recipe(text: Path) -> Recipe:
    return Recipe(
        name="tiny",
        seed=3,
        corpus=CorpusRecipe(
            {kind: (str(text / f"{kind}.jsonl"),) for kind in ("library", "docs", "chat")}
        ),
        mixture={"library": 2, "docs": 0},
        tokenizer=TokenizerRecipe(vocab_size=320),
        model={
            "model_type": "qwen3_moe",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
        },
        training=TrainingRecipe(
            steps=12,
            rows_per_step=3,
            row_length=48,
            learning_rate=0.01,
            warmup_steps=3,
            log_every=4,
            evaluate_every=6,
            evaluate_rows=4,
            checkpoint_seconds=0.0,
        ),
    )


@pytest.fixture(scope="session")
def data(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(recipe, tmp_path_factory.mktemp("data"))
