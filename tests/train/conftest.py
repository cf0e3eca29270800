"""A small standard library (some real modules, two help topics) and a recipe that trains on it in seconds."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from moebius.train.architecture import ModelRecipe
from moebius.train.data import PreparedData, prepare
from moebius.train.recipe import CorpusRecipe, Recipe, TokenizerRecipe, TrainingRecipe

MODULES = (
    "abc bisect calendar cmd code contextlib copy csv dis fnmatch glob heapq io keyword numbers operator pprint queue "
    "random reprlib sched shlex string textwrap timeit token"
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
    topics = {"assert": "Assert\n\nAssert statements are a convenient way to insert\nchecks.", "if": "If"}
    (root / "pydoc_data" / "topics.py").write_text(f"# made\ntopics = {topics!r}\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe(
        name="tiny",
        seed=3,
        corpus=CorpusRecipe(heldout_share=0.2, chat_examples=40),
        mixture={"library": 2, "tests": 0, "docs": 0},
        tokenizer=TokenizerRecipe(vocab_size=320),
        model=ModelRecipe(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            num_experts=4,
            experts_per_token=2,
            expert_width=16,
            max_position_embeddings=128,
        ),
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
def data(recipe: Recipe, library: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(recipe, tmp_path_factory.mktemp("data"), library)
