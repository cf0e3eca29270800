"""The table of config.json's keys is what transformers' sources say, and what transformers does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from models.config_keys import ROPE, TABLES, as_json, derive, rope_types, table
from moebius.models.reading import HARMLESS
from oracle import FAMILY, TINY, tiny_of


@pytest.mark.case("C1")
@pytest.mark.parametrize("kind", TABLES)
def test_the_table_is_what_the_sources_say(kind: str) -> None:
    """If not: PYTHONPATH=src:tests python -m models.config_keys, and look at what changed."""
    assert table(kind).read_text(encoding="utf-8") == as_json(derive(kind))
    assert ROPE.read_text(encoding="utf-8") == as_json(rope_types())


@pytest.mark.case("C1")
@pytest.mark.parametrize("kind", TABLES)
def test_the_table_has_every_key_that_a_running_model_reads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building a model, a prompt, and a step with its cache: nothing is looked up that the table
    lacks."""
    entry = json.loads(table(kind).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(kind, **{**TINY, **FAMILY[kind]})
    looked_up: set[str] = set()
    usual = PreTrainedConfig.__getattribute__

    def watched(self: PreTrainedConfig, key: str) -> Any:
        looked_up.add(key)
        return usual(self, key)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", watched)
    with torch.inference_mode():
        model = tiny_of(config)
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        model(torch.tensor([[8]]), past_key_values=cache)
    monkeypatch.undo()
    assert {"hidden_size", "tie_word_embeddings", "num_key_value_heads"} <= looked_up
    keys = {entry["aliases"].get(name, name) for name in looked_up if not name.startswith("_")}
    own = {name for name in keys if hasattr(PreTrainedConfig, name) and name not in entry["read"]}
    assert keys - own <= set(entry["read"]) | HARMLESS
