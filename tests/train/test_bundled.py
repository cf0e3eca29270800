"""The model in the package: its promises, checked on the files themselves."""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import moebius
from moebius.models.family import model_config
from moebius.models.store.load import load_decoder
from moebius.train.corpus import is_held_out
from moebius.train.data import PreparedData, pack
from moebius.train.evaluate import score
from moebius.train.export import parameter_counts
from moebius.train.recipe import read_recipe
from moebius.train.tokenizer import tokenizer_config

BUNDLED = Path(moebius.__file__).parent / "bundled"
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "bundled.toml"


def test_it_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 24_000_000
    assert {path.name for path in BUNDLED.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_is_the_recipes_model() -> None:
    recipe = read_recipe(RECIPE)
    stored = json.loads((BUNDLED / "config.json").read_text())
    assert recipe.model is not None
    ends = {
        "eos_token_id": 0,
        "pad_token_id": 0,
        "router_aux_loss_coef": 0.03,
        "torch_dtype": "bfloat16",
    }
    assert model_config(stored) == model_config(recipe.config_json(4096))
    assert ends.items() <= stored.items()
    assert json.loads((BUNDLED / "tokenizer_config.json").read_text()) == tokenizer_config(2048)
    decoder = load_decoder(BUNDLED, torch.bfloat16)
    total, used = parameter_counts(decoder)
    card = (BUNDLED / "README.md").read_text()
    assert f"{total:,} parameters, of which a token uses {used:,}" in card
    assert total <= 12_000_000
    assert "PSF-2.0" in card


def test_it_predicts_held_out_modules_about_as_its_card_says() -> None:
    """A few held-out modules of this Python, whichever it is; the card's figure is of all of one
    version's."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.name for path in library.glob("*.py") if is_held_out(path.name, 0.045))
    texts = [(library / name).read_text(encoding="utf-8")[:6000] for name in names[:4]]
    if not texts:
        pytest.skip("this Python has no library sources")
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    data = PreparedData(tokenizer, {}, {}, {}, end_of_text=0, im_start=1)
    measured = score(load_decoder(BUNDLED, torch.float32), pack(texts, tokenizer, 0), data, 512)
    row = re.search(
        r"\| library \| [\d,]+ \| \*\*([\d.]+)\*\*", (BUNDLED / "README.md").read_text()
    )
    assert row is not None
    assert measured.bits_per_byte == pytest.approx(float(row[1]), rel=0.35)
