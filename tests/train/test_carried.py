"""What fine-tuning does not train is carried over: as transformers reads the checkpoint before and
after."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moebius.errors import ConfigError
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.text import GenerationDefaults
from moebius.train.data import PreparedData
from moebius.train.export import export, measure, model_card
from moebius.train.recipe import Recipe
from moebius.train.run import main_from_recipe
from moebius.train.tables import FinetuneRecipe
from moebius.train.trainer import Trainer
from oracle import assert_close, load_theirs, save_tiny

GENERATION = {
    "temperature": 0.6,
    "top_p": 0.95,
    "do_sample": True,
    "eos_token_id": [266, 267],
    "pad_token_id": 266,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    "granitemoe": {"max_position_embeddings": 64},
}
FILES = {
    "special_tokens_map.json": '{"eos_token": "<|im_end|>"}',
    "added_tokens.json": '{"<|im_end|>": 2}',
    "chat_template.jinja": "{{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "sentencepiece",
    "LICENSE": "some licence",
    "LICENSE.txt": "some licence",
    "NOTICE": "a notice",
    "USE_POLICY.md": "a policy",
    "tokenization_own.py": "raise SystemExit('never run')",
    "README.md": "---\nlicense: other\nlicense_name: own\ntags: [a]\n---\n# Base\nlicense: in the "
    "text\n",
}


def base(folder: Path, data: PreparedData, model_type: str, **more: Any) -> Path:
    """A checkpoint as transformers 5 saves it, with all that published ones have beside."""
    save_tiny(
        folder, model_type, vocab_size=320, eos_token_id=[266, 267], **(FAMILIES[model_type] | more)
    )
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "optimizer.pt").write_text("not to be copied")
    data.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "model_max_length": 77})
    )
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def tuned(recipe: Recipe, data: PreparedData, checkpoint: Path, out: Path) -> Trainer:
    training = dataclasses.replace(recipe.training, learning_rate=0.01)
    start = dataclasses.replace(
        recipe, model=None, finetune=FinetuneRecipe(str(checkpoint)), training=training
    )
    trainer = Trainer(start, data)
    for _ in range(2):
        trainer.step()
    export(trainer, out)
    return trainer


@pytest.mark.case("A5")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_reads_the_same_beside_the_weights(
    recipe: Recipe, data: PreparedData, tmp_path: Path, model_type: str
) -> None:
    before, after = base(tmp_path / "base", data, model_type), tmp_path / "tuned"
    trainer = tuned(recipe, data, before, after)
    read = transformers.GenerationConfig.from_pretrained
    assert read(after).to_dict() == read(before).to_dict()
    assert read(after).eos_token_id == [266, 267] and read(after).temperature == 0.6
    configs = [
        transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (before, after)
    ]
    ours, theirs = (config | {"dtype": None, "_name_or_path": None} for config in configs[::-1])
    assert ours == theirs
    stored = json.loads((after / "config.json").read_text())
    assert (stored.get("torch_dtype"), stored.get("dtype")) == ("bfloat16", None)
    model = load_theirs(after)
    assert str(configs[1]["dtype"]).removeprefix("torch.") == "bfloat16"
    ids = torch.arange(4, 40)
    decoder = load_decoder(after, torch.float32)
    with torch.no_grad():
        hidden, _ = decoder(ids, torch.arange(36), PackedPast(36))
        assert_close(decoder.logits(hidden), model(ids.unsqueeze(0)).logits[0])
        was = load_theirs(before)(ids.unsqueeze(0)).logits[0]
    assert (decoder.logits(hidden) - was).abs().max() > 0.01, "it was trained"
    assert load_decoder(after, torch.bfloat16).config == trainer.decoder.config


@pytest.mark.case("A5")
def test_the_files_beside_are_there(recipe: Recipe, data: PreparedData, tmp_path: Path) -> None:
    before, after = base(tmp_path / "base", data, "llama"), tmp_path / "tuned"
    tuned(recipe, data, before, after)
    for name in FILES.keys() - {"README.md"}:
        assert (after / name).read_text() == FILES[name], name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes(), name
    assert not (after / "README.md").exists() and not (after / "optimizer.pt").exists()
    assert {path.name for path in after.glob("*.safetensors*")} == {"model.safetensors"}


@pytest.mark.case("A5")
@pytest.mark.parametrize("said", ["nowhere", "in config.json"])
def test_without_a_generation_config_the_ends_stay(
    recipe: Recipe, data: PreparedData, tmp_path: Path, said: str
) -> None:
    """Where the checkpoint says no end at all, it is the token that training put between
    documents."""
    before, after = base(tmp_path / "base", data, "llama"), tmp_path / "tuned"
    (before / "generation_config.json").unlink()
    config = json.loads((before / "config.json").read_text())
    ends = None if said == "nowhere" else [266, 267]
    (before / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    tuned(recipe, data, before, after)
    assert GenerationDefaults.load(after).eos_ids == frozenset(ends or [0, 2])


@pytest.mark.case("A5")
def test_a_head_stays_tied_or_not_as_it_was_loaded(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    for tie in (True, False):
        before, after = (
            base(tmp_path / f"base{tie}", data, "llama", tie_word_embeddings=tie),
            tmp_path / f"tuned{tie}",
        )
        trainer = tuned(recipe, data, before, after)
        assert (trainer.decoder.lm_head is None) == tie
        assert json.loads((after / "config.json").read_text())["tie_word_embeddings"] == tie
        assert load_theirs(after).config.tie_word_embeddings == tie


@pytest.mark.case("A5")
def test_the_card_names_what_it_was_made_from(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    before = base(tmp_path / "base", data, "llama")
    trainer = tuned(recipe, data, before, tmp_path / "tuned")
    summary = {
        "figures": measure(trainer.decoder, trainer.recipe, data),
        "tokens_per_second": 1,
        "seconds": 1.0,
    }
    template = (Path(model_card.__code__.co_filename).parent / "card.md").read_text()
    card = model_card(
        template, trainer.decoder, trainer.recipe, data.facts, summary, recipe_path="r.toml"
    )
    head, body = card.split("---\n")[1:3]
    assert head.splitlines()[2:] == ["license: other", "license_name: own"]
    assert "Fine-tuned from `base`: all of its parameters" in body
    fresh = model_card(template, trainer.decoder, recipe, data.facts, summary, recipe_path="r.toml")
    assert "Fine-tuned" not in fresh and "license" not in fresh


RECIPE = """
name = "tuned"
[finetune]
checkpoint = "base"
[corpus]
files = { book = "book.txt" }
heldout_share = 0.1
[training]
steps = 2
rows_per_step = 1
row_length = 32
learning_rate = 0.001
warmup_steps = 1
"""


def test_the_checkpoint_itself_is_never_overwritten(data: PreparedData, tmp_path: Path) -> None:
    base(tmp_path / "base", data, "llama")
    (tmp_path / "book.txt").write_text("some words\n" * 300)
    (tmp_path / "tuned.toml").write_text(RECIPE)
    with pytest.raises(
        ConfigError, match="base is the checkpoint that is to be fine-tuned; choose another --out"
    ):
        main_from_recipe(tmp_path / "tuned.toml", tmp_path / "base")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("of something else")
    with pytest.raises(
        ConfigError, match=r"other holds README\.md already, which training would replace"
    ):
        main_from_recipe(tmp_path / "tuned.toml", tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text() == "of something else"
    main_from_recipe(tmp_path / "tuned.toml", tmp_path / "new")
    assert "Fine-tuned from `base`" in (tmp_path / "new" / "README.md").read_text()


def test_experts_of_a_dense_model_are_none_to_train(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    before = base(tmp_path / "base", data, "llama")
    start = dataclasses.replace(recipe, model=None, finetune=FinetuneRecipe(str(before), "experts"))
    with pytest.raises(
        ConfigError, match=r'finetune\.train is "experts", but no layer of the model has any'
    ):
        start.check_trainable(load_decoder(before, torch.float32).config)
    capped = dataclasses.replace(load_decoder(before, torch.float32).config, logits_softcap=30.0)
    with pytest.raises(ConfigError, match=r"logits are capped at 30\.0, which training does not"):
        recipe.check_trainable(capped)
    with pytest.raises(
        ConfigError, match=r"layers, training\.init_scale and .* are for a new model"
    ):
        dataclasses.replace(start, training=dataclasses.replace(recipe.training, init_scale=0.1))
