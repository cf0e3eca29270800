from __future__ import annotations

from pathlib import Path

import pytest

from moebius.errors import ConfigError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.family import model_config
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig
from moebius.ops.config import RouterConfig
from moebius.train.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = """
name = "r"
[corpus.files]
library = "a.txt"
[model]
model_type = "qwen3_moe"
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
num_experts = 4
num_experts_per_tok = 2
norm_topk_prob = true
moe_intermediate_size = 16
max_position_embeddings = 64
[training]
steps = 200
rows_per_step = 2
row_length = 32
learning_rate = 0.01
"""
OWN = """
model_type = "moebius"
hidden_size = 32
num_hidden_layers = 3
num_attention_heads = 4
max_position_embeddings = 64
qk_norm = "head"
[[layers]]
width = 24
[[layers]]
width = 16
gated = false
router = { num_experts = 4, top_k = 2 }
[training]
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
        (
            "steps = 200",
            "stepps = 200",
            r"unknown recipe key training\.stepps; known are steps, rows_per_step",
        ),
        (
            "[training]",
            "[routing]\ncapacity = 1\n[training]",
            r"unknown recipe key routing\.capacity; known are dropless",
        ),
        ("steps = 200\n", "", r"the recipe lacks training\.steps"),
        ('[corpus.files]\nlibrary = "a.txt"', "", "the recipe lacks corpus"),
        ('library = "a.txt"', "", r"corpus\.files is \{\}; it must have at least 1 item"),
        (
            'name = "r"',
            'name = "r"\nmagic = 1',
            r"unknown recipe key magic; known are name, training",
        ),
        ("steps = 200", "steps = 2.5", r"training\.steps is 2\.5; it must be a valid integer"),
        ("steps = 200", "steps = true", r"training\.steps is True; it must be a valid integer"),
        ("steps = 200", 'steps = "200"', r"training\.steps is '200'; it must be a valid integer"),
        (
            "steps = 200",
            "steps = 2026-01-01",
            r"training\.steps is '2026-01-01'; it must be a valid integer",
        ),
        ("steps = 200", "steps = 0", r"training\.steps is 0; it must be greater than 0"),
        (
            "steps = 200",
            "steps = 50",
            r"warmup_steps is 100; it must be less than training\.steps = 50",
        ),
        (
            "learning_rate = 0.01",
            "learning_rate = inf",
            r"learning_rate is inf; it must be a finite number",
        ),
        (
            "learning_rate = 0.01",
            "learning_rate = 0.01\nbeta2 = 1.0",
            r"beta2 is 1\.0; it must be less than 1",
        ),
        (
            "learning_rate = 0.01",
            "learning_rate = 0.01\nz_loss = -1",
            r"z_loss is -1; it must be greater than or equal to 0",
        ),
        (
            "learning_rate = 0.01",
            "learning_rate = 0.01\nfinal_share = 2",
            r"final_share is 2; it must be less than or eq",
        ),
        (
            "row_length = 32",
            "row_length = 65",
            r"row_length = 65 exceeds the model.s context of 64",
        ),
        (
            "moe_intermediate_size = 16",
            "moe_intermediate_size = 12",
            r"widths \[12, 32\] must be multiples of 8",
        ),
        (
            "num_experts_per_tok = 2",
            "num_experts_per_tok = 5",
            r"top_k .* is 5; .* num_experts = 4",
        ),
        (
            "num_hidden_layers = 1",
            "num_hidden_layers = 0",
            r"model: num_hidden_layers is 0; it must be an integer of",
        ),
        ("num_hidden_layers = 1", "layers = 1", r"model: num_hidden_layers is missing"),
        (
            "head_dim = 8",
            "head_dim = 8\nsize = 1",
            r"model: models of type qwen3_moe know no size; correct it",
        ),
        (
            '"qwen3_moe"',
            '"gpt5"',
            r"model: model_type 'gpt5' is not supported; supported are .*dots1",
        ),
        (
            "head_dim = 8",
            "initializer_range = 0",
            r"model\.initializer_range is 0; it must be positive",
        ),
        (
            "num_attention_heads = 4",
            "num_attention_heads = 3",
            r"num_attention_heads = 3 is no multiple",
        ),
        (
            "[training]",
            "[mixture]\nlibrary = -1\n[training]",
            r"mixture\.library is -1; it must be greater than or eq",
        ),
        (
            "[training]",
            "[mixture]\nlibrary = 0\n[training]",
            "every kind of text is passed over 0 times",
        ),
        (
            "[training]",
            "[corpus]\nheldout_share = 0.9\n[training]",
            r"heldout_share is 0\.9; it must be less than 0\.5",
        ),
        (
            "[training]",
            "[tokenizer]\nvocab_size = 100000\n[training]",
            r"vocab_size is 100000; it must be less than",
        ),
        (
            "[training]",
            "[tokenizer]\nvocab_size = 100\n[training]",
            r"vocab_size is 100; it must be greater than or equal",
        ),
        ('name = "r"', 'name = "r"\ntokenizer = 3', r"tokenizer is 3; it must be an object"),
        (
            "[training]",
            "[mixture]\npoems = 1\n[training]",
            r"mixture\.poems names no kind of text .*; there are library",
        ),
        ('name = "r"', "name = ", "is not TOML"),
        (
            "num_experts_per_tok = 2",
            "num_experts_per_tok = 1",
            "renormalised top-1 .* no gradient; use raw weights",
        ),
        (
            "[training]",
            "[routing]\ncapacity_factor = 1.25\n[training]",
            "dropless router has no capacity; set",
        ),
        (
            "[training]",
            "[routing]\ndropless = false\n[training]",
            "dropless is false; give capacity_factor",
        ),
        (
            "[training]",
            '[routing]\nchoice = "token"\n[training]',
            "unknown recipe key routing.choice; known are dropless",
        ),
        ("moe_intermediate_size = 16", "", "model: moe_intermediate_size is missing"),
        (
            "[training]",
            "[routing]\njitter = 1\n[training]",
            r"jitter is 1\.0; it must be at least 0 and less than 1",
        ),
        (
            "[training]",
            '[routing]\nsecond_policy = "none"\n[training]',
            "it must be 'all', 'threshold' or 'random'",
        ),
        (
            MINIMAL[MINIMAL.index("num_experts_per_tok") : MINIMAL.index("[training]")],
            "moe_intermediate_size = 16\nnum_experts_per_tok = 1\nmax_position_embeddings = 64\n"
            '[routing]\nsecond_policy = "random"\n',
            "routing.second_policy needs 2 experts a token or more",
        ),
        (
            "head_dim = 8",
            "decoder_sparse_step = 2",
            "no layer has experts; lower decoder_sparse_step",
        ),
        (
            "learning_rate = 0.01",
            "learning_rate = 0.01\naccumulation = 3",
            "no multiple of training.accumulation = 3",
        ),
        (
            "learning_rate = 0.01",
            "learning_rate = 0.01\nbias_rate = 0.1",
            "the model's router has no selection bias",
        ),
        (
            "[training]",
            '[finetune]\ncheckpoint = "x"\n[training]',
            "either a model table, .* or a finetune table",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError, match=message):
        _read(MINIMAL.replace(old, new), tmp_path)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file or directory$"):
        read_recipe(tmp_path / "none.toml")


def decoder(recipe: Recipe) -> ModelConfig:
    assert recipe.model is not None
    return model_config(recipe.config_json(4096))


def test_the_model_is_the_recipes(tmp_path: Path) -> None:
    """qwen3_moe in full: every layer sparse, weights of the chosen experts renormalised, heads
    normalised, tied."""
    assert decoder(_read(MINIMAL, tmp_path)) == ModelConfig(
        model_type="qwen3_moe",
        hidden_size=32,
        vocab_size=4096,
        context=64,
        layers=(
            LayerSpec(
                GQA(4, 2, 8, rope=RopeConfig(theta=10_000.0), qk_norm="head"),
                FeedForwardConfig(
                    width=16, router=RouterConfig(num_experts=4, top_k=2, weight="renorm")
                ),
            ),
        ),
        tie_word_embeddings=True,
    )


def test_layers_of_our_own_take_turns(tmp_path: Path) -> None:
    a, b = MINIMAL.index("model_type"), MINIMAL.index("steps")
    config = decoder(_read(MINIMAL[:a] + OWN.lstrip() + MINIMAL[b:], tmp_path))
    dense, sparse = FeedForwardConfig(24), FeedForwardConfig(16, RouterConfig(4, 2), gated=False)
    assert (config.feed_forward, config.attention.qk_norm) == ((dense, sparse, dense), "head")
    for old, new, message in (
        (
            "width = 24",
            "width = 24\nrouter = { num_experts = 8, top_k = 2 }",
            "have different routers, which training",
        ),
        (
            "top_k = 2",
            'top_k = 2, score = "best"',
            "layers.router.score is 'best'; it must be 'softmax', 'sigmoid' or",
        ),
        (
            "top_k = 2",
            "top_k = 2, scores = 1",
            "unknown recipe key layers.router.scores; known are num_experts, top_k",
        ),
        ("width = 24", "", "the recipe lacks layers.width"),
        (
            "num_hidden_layers = 3",
            "num_hidden_layers = true",
            "model: num_hidden_layers is True; it must be an integer",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            _read(MINIMAL[:a] + OWN.lstrip().replace(old, new) + MINIMAL[b:], tmp_path)


def test_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    files = 'code = "src"\ntext = ["a.txt", "/b.jsonl"]'
    recipe = _read(MINIMAL.replace('library = "a.txt"', files), tmp_path)
    assert recipe.corpus.files == {
        "code": (str(tmp_path / "src"),),
        "text": (str(tmp_path / "a.txt"), "/b.jsonl"),
    }


def test_the_bundled_recipe_keeps_its_promises() -> None:
    recipe = read_recipe(ROOT / "recipes" / "bundled.toml")
    routers = {part.router for part in decoder(recipe).feed_forward}
    assert routers == {RouterConfig(16, 3, weight="renorm")}
    assert recipe.tokenizer.vocab_size == 4096
    assert recipe.training.load_balance > 0
    assert recipe.training.z_loss > 0


RECIPES = {
    "bundled": "qwen3_moe",
    "tiny": "qwen3_moe",
    "switch": "qwen3_moe",
    "gshard": "moebius",
    "st_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "deepseek": "dots1",
    "finetune": None,
    "blocks": "qwen3_moe",
}


@pytest.mark.parametrize(("name", "kind"), RECIPES.items())
def test_the_recipes_that_come_along(name: str, kind: str | None) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml")
    assert (None if recipe.model is None else decoder(recipe).model_type) == kind


def test_no_recipe_is_left_out() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == set(RECIPES)


@pytest.mark.case("C13")
@pytest.mark.parametrize("kind", ["", "a/b", "../../up", "k" * 300, "all", "a\\nb", "."])
def test_a_kind_of_text_can_be_part_of_a_file_s_name(kind: str, tmp_path: Path) -> None:
    """Streams are called by their kinds: one with a slash in it would be written somewhere else."""
    with pytest.raises(ConfigError, match=r"^corpus\.files"):
        _read(MINIMAL.replace("library =", f'"{kind}" ='), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (
            "a.txt",
            "~nobodyatall/a.txt",
            "'~nobodyatall/a.txt' is no path: Could not determine home directory",
        ),
        ("a.txt", "a\\u0000.txt", "is no path: it holds a zero byte"),
        ('name = "r"', f"name = {'[' * 3000}{']' * 3000}", "nested too deeply"),
        (
            'name = "r"',
            'name = "r"\nseed = -5',
            "seed is -5; it must be greater than or equal to 0",
        ),
    ],
)
def test_what_only_fails_later_is_refused_when_it_is_read(
    old: str, new: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        _read(MINIMAL.replace(old, new), tmp_path)
