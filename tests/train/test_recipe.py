from __future__ import annotations

from pathlib import Path

import pytest

from moebius.config import FeedForwardConfig, ModelConfig, RopeConfig, RouterConfig
from moebius.errors import ConfigError
from moebius.train.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = """
name = "r"
[model]
hidden_size = 32
num_layers = 1
num_heads = 4
num_kv_heads = 2
head_dim = 8
num_experts = 4
experts_per_token = 2
expert_width = 16
max_position_embeddings = 64
[training]
steps = 200
rows_per_step = 2
row_length = 32
learning_rate = 0.01
"""


def _read(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text)
    return read_recipe(path)


def test_defaults_and_an_integer_for_a_number(tmp_path: Path) -> None:
    recipe = _read(MINIMAL.replace("0.01", "1"), tmp_path)
    assert recipe.training.learning_rate == 1.0
    assert (recipe.training.load_balance, recipe.training.z_loss) == (0.01, 0.001)
    assert recipe.tokenizer.vocab_size == 4096


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 200", "stepps = 200", r"unknown recipe key training\.stepps; known are steps"),
        ("steps = 200\n", "", r"the recipe lacks training\.steps"),
        ('name = "r"', 'name = "r"\nmagic = 1', r"unknown recipe key magic"),
        ("steps = 200", "steps = 2.5", r"training\.steps is 2\.5; it must be of type int"),
        ("steps = 200", "steps = true", r"training\.steps is True; it must be of type int"),
        ("steps = 200", "steps = 0", r"training\.steps is 0; it must be at least 1"),
        ("steps = 200", "steps = 50", r"warmup_steps is 100; it must be less than training\.steps = 50"),
        ("learning_rate = 0.01", "learning_rate = inf", r"learning_rate is inf; it must be a positive"),
        ("learning_rate = 0.01", "learning_rate = 0.01\nbeta2 = 1.0", r"beta2 is 1\.0; it must be at least 0 and less"),
        ("learning_rate = 0.01", "learning_rate = 0.01\nz_loss = -1", r"z_loss is -1\.0; it must not be negative"),
        ("learning_rate = 0.01", "learning_rate = 0.01\nfinal_share = 2", r"final_share is 2\.0; it must lie"),
        ("row_length = 32", "row_length = 65", r"row_length = 65 exceeds model\.max_position_embeddings = 64"),
        ("expert_width = 16", "expert_width = 12", r"expert_width is 12; .* multiple of 8"),
        ("experts_per_token = 2", "experts_per_token = 5", r"top_k .* is 5; .* num_experts = 4"),
        ("num_layers = 1", "num_layers = 0", r"model\.num_layers is 0; it must be at least 1"),
        ("num_heads = 4", "num_heads = 3", r"num_attention_heads = 3 is no multiple"),
        ("[training]", "[mixture]\nlibrary = -1\n[training]", r"mixture\.library is -1; it must not"),
        ("[training]", "[mixture]\nlibrary=0\ntests=0\ndocs=0\nchat=0\n[training]", "every kind of text is"),
        ("[training]", "[corpus]\nchat_examples = 0\n[training]", r"mixture\.chat is 1 but corpus\.chat_examples is 0"),
        ("[training]", "[corpus]\nheldout_share = 0.9\n[training]", r"heldout_share is 0\.9; it must lie between"),
        ("[training]", "[tokenizer]\nvocab_size = 100000\n[training]", r"vocab_size is 100000; it must lie between"),
        ('name = "r"', 'name = "r"\ncorpus = 3', r"corpus is 3; it must be a table"),
        ("[training]", "[mixture]\npoems = 1\n[training]", r"mixture\.poems names no kind of text; there are library"),
        ('name = "r"', "name = ", "is not TOML"),
        ("experts_per_token = 2", "experts_per_token = 1", "renormalised top-1 .* no gradient; use weight = 'raw'"),
        ("[training]", "[routing]\ncapacity_factor = 1.25\n[training]", "dropless router has no capacity; set"),
        ("[training]", "[routing]\ndropless = false\n[training]", "dropless is false; give capacity_factor"),
        ("[training]", '[routing]\nchoice = "expert"\n[training]', "causal decoder must not see"),
        ("[training]", '[routing]\nchoice = "batch_prioritised"\n[training]', "causal decoder must not see"),
        ("[training]", "[routing]\njitter = 1\n[training]", r"jitter is 1\.0; it must be at least 0 and less than 1"),
        ("[training]", '[routing]\nsecond_policy = "none"\n[training]', "must be all, threshold or random"),
        ("experts_per_token = 2", 'weight = "softmax"', r"model\.weight is 'softmax'; it must be one of raw, renorm"),
        ("num_layers = 1", "num_layers = 1\nsparse_every = 2", "no layer has experts"),
        ("learning_rate = 0.01", "learning_rate = 0.01\naccumulation = 3", "no multiple of training.accumulation = 3"),
        ("learning_rate = 0.01", "learning_rate = 0.01\nbias_rate = 0.1", r"model\.selection_bias is false"),
        ("[training]", '[finetune]\ncheckpoint = "x"\n[training]', "either a model table, .* or a finetune table"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError, match=message):
        _read(MINIMAL.replace(old, new), tmp_path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        read_recipe(tmp_path / "none.toml")


def test_the_model_is_the_recipes(tmp_path: Path) -> None:
    """qwen3_moe in full: every layer sparse, weights of the chosen experts renormalised, heads normalised, tied."""
    model = _read(MINIMAL, tmp_path).model
    assert model is not None
    assert model.config(4096) == ModelConfig(
        model_type="qwen3_moe",
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=4096,
        max_position_embeddings=64,
        rope=RopeConfig(theta=10_000.0),
        feed_forward=(FeedForwardConfig(width=16, router=RouterConfig(num_experts=4, top_k=2, weight="renorm")),),
        windows=(None,),
        tie_word_embeddings=True,
        qk_norm="head",
    )


def test_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    files = '[corpus.files]\ncode = "src"\ntext = ["a.txt", "/b.jsonl"]\n[training]'
    recipe = _read(MINIMAL.replace("[training]", files), tmp_path)
    assert recipe.corpus.files == {
        "code": (str(tmp_path / "src"),),
        "text": (str(tmp_path / "a.txt"), "/b.jsonl"),
    }
    assert recipe.corpus.kinds == ("code", "text")


def test_the_bundled_recipe_keeps_its_promises() -> None:
    recipe = read_recipe(ROOT / "recipes" / "bundled.toml")
    assert recipe.model is not None and recipe.model.num_experts >= 8
    assert recipe.model.experts_per_token == 2
    assert recipe.tokenizer.vocab_size == 4096
    assert recipe.training.load_balance > 0
    assert recipe.training.z_loss > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bundled", "qwen3_moe"),
        ("switch", "qwen3_moe"),
        ("gshard", "moebius"),
        ("st_moe", "qwen3_moe"),
        ("olmoe", "olmoe"),
        ("deepseek", "dots1"),
        ("finetune", None),
    ],
)
def test_the_recipes_that_come_along(name: str, kind: str | None) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml")
    assert (None if recipe.model is None else recipe.model.published()[0]) == kind


def test_no_recipe_is_left_out() -> None:
    names = {"bundled", "switch", "gshard", "st_moe", "olmoe", "deepseek", "finetune"}
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == names
