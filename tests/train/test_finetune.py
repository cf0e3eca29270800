"""Fine-tuning: from directories of transformers, what is frozen, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_t5
from covering import chosen
from moebius.errors import ConfigError, WeightsError
from moebius.models.store.load import load_decoder
from moebius.train.data import PreparedData, prepare
from moebius.train.export import export
from moebius.train.recipe import Recipe
from moebius.train.tables import CorpusRecipe, FinetuneRecipe
from moebius.train.trainer import Trainer
from oracle import load_theirs, save_tiny

CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 20},
    "granitemoe": {},
    "dots1": {},
    "qwen2": {"tie_word_embeddings": False},
}


def start(
    recipe: Recipe, data: PreparedData, folder: Path, model_type: str, **finetune: Any
) -> tuple[Recipe, Path]:
    """A random model of transformers over the tests' vocabulary, and a recipe that continues it."""
    folder.mkdir(exist_ok=True)
    save_tiny(
        folder,
        model_type,
        vocab_size=320,
        max_position_embeddings=64,
        **CHANGES.get(model_type, {}),
    )
    data.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "mine": True})
    )
    training = dataclasses.replace(recipe.training, learning_rate=0.003, steps=20)
    tuned = FinetuneRecipe(str(folder), **finetune)
    return dataclasses.replace(recipe, model=None, finetune=tuned, training=training), folder


@pytest.mark.parametrize("model_type", chosen(CHANGES, {"dots1", "qwen2"}.__contains__))
def test_it_begins_where_the_checkpoint_is_and_learns(
    recipe: Recipe, data: PreparedData, tmp_path: Path, model_type: str
) -> None:
    tuned, folder = start(recipe, data, tmp_path / "base", model_type)
    trainer = Trainer(tuned, data)
    for name, parameter in load_decoder(folder, torch.float32).named_parameters():
        assert torch.equal(trainer.tensors()[f"master.{name}"], parameter), name
    before = trainer.evaluate(4)["all"]
    reports = [trainer.step() for _ in range(20)]
    assert trainer.evaluate(4)["all"] < before - 0.05
    assert all((r.balance > 0.5) == (model_type != "qwen2") for r in reports), (
        "the auxiliary losses stay on"
    )
    out = tmp_path / "tuned"
    export(trainer, out)
    stored = json.loads((out / "config.json").read_text())
    assert stored | {"torch_dtype": 0, "dtype": 0} == json.loads(
        (folder / "config.json").read_text()
    ) | {
        "torch_dtype": 0,
        "dtype": 0,
    }
    assert json.loads((out / "tokenizer_config.json").read_text())["mine"]
    assert load_decoder(out, torch.bfloat16).config == trainer.decoder.config


@pytest.mark.parametrize("part", ["experts", "all_but_experts"])
def test_what_is_frozen_stays(
    recipe: Recipe, data: PreparedData, tmp_path: Path, part: str
) -> None:
    tuned, _ = start(recipe, data, tmp_path, "dots1", train=part)
    trainer = Trainer(tuned, data)
    before = {name: x.clone() for name, x in trainer.tensors().items()}
    for _ in range(3):
        trainer.step()
    for name, x in trainer.tensors().items():
        if name.startswith("master.") and "selection_bias" not in name:
            # The first layer of this dots1 is dense: its feed-forward is none of the experts.
            is_expert = "layers.1.mlp.experts." in name
            assert torch.equal(x, before[name]) == (is_expert != (part == "experts")), name


def test_dropout_is_drawn_anew_each_step_but_the_same_in_each_run(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    tuned, _ = start(recipe, data, tmp_path, "mixtral")
    losses = [
        [trainer.step().loss for _ in range(3)]
        for trainer in (Trainer(tuned, data), Trainer(tuned, data))
    ]
    assert losses[0] == losses[1]
    assert tuned.finetune is not None
    plain = dataclasses.replace(
        tuned, finetune=dataclasses.replace(tuned.finetune, dropout=0.0, expert_dropout=0.0)
    )
    assert Trainer(plain, data).step().loss != losses[0][0]


def test_its_own_tokenizer_is_used(recipe: Recipe, data: PreparedData, tmp_path: Path) -> None:
    tuned, _ = start(recipe, data, tmp_path / "base", "mixtral")
    (tmp_path / "book.txt").write_text("some words\n" * 300)
    corpus = CorpusRecipe({"book": (str(tmp_path / "book.txt"),)}, heldout_share=0.1)
    tuned = dataclasses.replace(tuned, corpus=corpus, mixture={})
    prepared = prepare(tuned, tmp_path / "data")
    assert prepared.tokenizer.to_str() == data.tokenizer.to_str() and prepared.train.keys() == {
        "book"
    }
    with pytest.raises(ConfigError, match=r"the tokenizer lacks <eos>, .* tokenizer\.end_of_text"):
        tokenizer = dataclasses.replace(tuned.tokenizer, end_of_text="<eos>")
        prepare(dataclasses.replace(tuned, tokenizer=tokenizer), tmp_path / "data")


def test_a_gguf_file_is_nothing_to_continue(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    tuned = FinetuneRecipe(checkpoint=str(tmp_path / "m.gguf"))
    with pytest.raises(ConfigError, match=r"is the GGUF file .*m\.gguf; fine-tuning starts from a"):
        dataclasses.replace(recipe, model=None, finetune=tuned).base()


def test_what_does_not_fit_is_refused(recipe: Recipe, data: PreparedData, tmp_path: Path) -> None:
    tuned, folder = start(recipe, data, tmp_path, "mixtral")
    path = folder / "config.json"
    config = json.loads(path.read_text())

    def refused(
        error: type[Exception], message: str, recipe: Recipe = tuned, **changes: Any
    ) -> None:
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=message):
            Trainer(recipe, data)

    refused(WeightsError, r"has shape \[.*\]; config\.json needs", intermediate_size=28)
    refused(WeightsError, "is missing", num_local_experts=7)
    refused(ConfigError, "renormalised top-1", num_experts_per_tok=1)
    refused(ConfigError, "exceeds the model.s context of 32", max_position_embeddings=32)
    long = dataclasses.replace(recipe.training, bias_rate=0.1)
    refused(ConfigError, "router has no selection bias", dataclasses.replace(tuned, training=long))
    big = dataclasses.replace(data, facts={**data.facts, "vocab_size": 321})
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="the tokenizer has 321 entries, the checkpoint 320"):
        Trainer(tuned, big)


def test_an_encoder_and_a_decoder_are_not_trained(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    tiny_t5.tiny("switch_transformers", vocab_size=320).save_pretrained(tmp_path)
    tuned = dataclasses.replace(
        recipe, model=None, finetune=FinetuneRecipe(checkpoint=str(tmp_path))
    )
    with pytest.raises(ConfigError, match=r"are an encoder and a decoder, .* not trained"):
        Trainer(tuned, data)


@pytest.mark.case("A1")
def test_a_head_that_differs_from_its_embedding_is_tuned_as_one_of_its_own(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    """config.json says tie_word_embeddings, but the file holds two matrices: two are trained, and
    exported."""
    tuned, folder = start(recipe, data, tmp_path / "base", "qwen3", dropout=0.0)
    tensors = load_file(folder / "model.safetensors")
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    trainer = Trainer(tuned, data)
    trainer.step()
    export(trainer, tmp_path / "out")
    model = load_theirs(tmp_path / "out")
    pairs = ((model.lm_head.weight, head), (model.model.embed_tokens.weight, embedding))
    moved = [(ours.detach() - theirs).abs().max() for ours, theirs in pairs]
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert all(0 < change < 0.02 for change in moved), "each is still the one that it began as"
