"""The table of config.json's keys is what transformers' sources say, and what transformers does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

import tiny_t5
from models.config_keys import ROPE, TABLES, as_json, derive, rope_types, table
from moebius.models.reading import HARMLESS
from oracle import FAMILY, TINY, tiny_of
from tiny_t5 import answers, tiny_config


@pytest.mark.case("C1")
@pytest.mark.parametrize("kind", TABLES)
def test_the_table_is_what_the_sources_say(kind: str) -> None:
    """If not: PYTHONPATH=src:tests python -m models.config_keys, and look at what changed."""
    assert table(kind).read_text(encoding="utf-8") == as_json(derive(kind))


def test_the_table_of_ropes_is_what_the_sources_say() -> None:
    assert ROPE.read_text(encoding="utf-8") == as_json(rope_types())


@pytest.mark.case("C1")
@pytest.mark.parametrize("kind", TABLES)
def test_the_table_has_every_key_that_a_running_model_reads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building a model, a prompt, and a step with its cache: nothing is looked up that the table
    lacks."""
    entry = json.loads(table(kind).read_text(encoding="utf-8"))
    alone = kind in FAMILY  # else it is a decoder beside an encoder
    config = AutoConfig.for_model(kind, **{**TINY, **FAMILY[kind]}) if alone else tiny_config(kind)
    looked_up: set[str] = set()
    usual = PreTrainedConfig.__getattribute__

    def watched(self: PreTrainedConfig, key: str) -> Any:
        looked_up.add(key)
        return usual(self, key)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", watched)
    with torch.inference_mode():
        if alone:
            model = tiny_of(config)
            cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
            model(torch.tensor([[8]]), past_key_values=cache)
        else:
            answers(tiny_t5.tiny_of(config), [5, 6, 7], 2)
    monkeypatch.undo()
    every = {"hidden_size", "tie_word_embeddings", "num_key_value_heads"} if alone else {"d_kv"}
    assert every <= looked_up
    keys = {entry["aliases"].get(name, name) for name in looked_up if not name.startswith("_")}
    own = {name for name in keys if hasattr(PreTrainedConfig, name) and name not in entry["read"]}
    assert keys - own <= set(entry["read"]) | HARMLESS
