"""What a model's own files say about ending and sampling never breaks a request; what has no effect
is said once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from moebius.llm import LLM
from moebius.request.params import SamplingParams
from moebius.text import GenerationDefaults, Tokenizer
from text.tiny_tokenizers import byte_level, save


def load_defaults(folder: Path, generation: object, vocab_size: int = 100) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return GenerationDefaults.load(folder)


def transformers_accepts(folder: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig.from_pretrained(folder)


@pytest.mark.case("C14")
@pytest.mark.parametrize(
    ("eos", "kept", "named"),
    [
        ([7, 100], {7}, "100"),
        (100_000, set(), "100000"),
        ([5, -1, 5], {5}, "-1"),
        ([5, None, 99, 5], {5, 99}, None),
        (None, set(), None),
        ([], set(), None),
    ],
)
def test_end_ids_that_the_logits_do_not_reach_are_ignored(tmp_path, caplog, eos, kept, named):
    found = load_defaults(tmp_path, {"eos_token_id": eos})
    transformers_accepts(tmp_path)
    assert found.eos_ids == kept
    assert len(caplog.records) == (named is not None)
    if named:
        assert (
            f"generation_config.json: end token id {named} is not in the model's vocabulary of 100"
            in caplog.text
        )


@pytest.mark.case("C14")
def test_end_ids_of_other_files_and_a_vocabulary_of_a_text_config(tmp_path, caplog):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path, eos_token="<|im_end|>"))
    config = {"eos_token_id": 9, "text_config": {"vocab_size": 4, "eos_token_id": [3, 4]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tokenizer.eos_id == 4
    assert GenerationDefaults.load(tmp_path, tokenizer).eos_ids == {3}
    for name, token in (("config.json", 9), ("config.json: text_config", 4), ("the tokenizer", 4)):
        assert f"{name}: end token id {token} is not" in caplog.text


@pytest.mark.case("C14")
@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("top_p", 0.0, True),
        ("top_p", 0, True),
        ("top_p", 1, True),
        ("top_p", 1.5, False),
        ("top_p", -0.1, False),
        ("top_k", 0, True),
        ("top_k", -1, True),
        ("top_k", -5, False),
        ("top_k", 50.0, True),
        ("top_k", 10**12, False),
        ("temperature", 0, True),
        ("temperature", -1.0, False),
        ("temperature", 1000.0, False),
        ("temperature", math.inf, False),
        ("top_k", math.inf, False),
        ("top_k", 10**400, False),
        ("temperature", 10**400, False),
        ("min_p", 1.01, False),
        ("repetition_penalty", 0, False),
        ("repetition_penalty", math.nan, False),
    ],
)
def test_a_sampling_default_never_breaks_a_request(tmp_path, caplog, name, value, taken):
    """What SamplingParams takes is taken; the rest is named in the log, and the client's own values
    still work."""
    found = load_defaults(tmp_path, {name: value, "do_sample": True})
    transformers_accepts(tmp_path)
    SamplingParams(**found.sampling)
    assert (name in found.sampling) == taken
    assert ("generation_config.json: ignored" in caplog.text) == (not taken)
    assert taken or f"{name} = {value!r} (it must be" in caplog.text


@pytest.mark.case("C14")
def test_a_model_with_such_files_answers(tiny_model: Path, tmp_path: Path) -> None:
    """top_p = 0 as transformers treats it: the best token stays, at any temperature."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    generation = {
        "top_p": 0.0,
        "temperature": 1.5,
        "eos_token_id": [0, 99_999],
        "repetition_penalty": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    llm = LLM(str(folder), max_model_len=64, kv_cache_memory_bytes=2**20)
    drawn, greedy = (
        llm.generate("x", params)[0].outputs[0].token_ids
        for params in (
            llm.default_params(max_tokens=8, min_tokens=4),
            SamplingParams(max_tokens=8, min_tokens=4, temperature=0),
        )
    )
    assert drawn == greedy and len(drawn) >= 4


@pytest.mark.case("C14")
def test_what_is_not_done_is_named_in_one_line(tmp_path, caplog):
    neutral = {
        "typical_p": 1.0,
        "num_beams": 1,
        "stop_strings": None,
        "no_repeat_ngram_size": 0,
        "max_length": 20,
    }
    assert load_defaults(tmp_path, neutral | {"do_sample": True, "temperature": 0.5}).sampling == {
        "temperature": 0.5
    }
    assert not caplog.records
    asked = {
        "typical_p": 0.9,
        "num_beams": 4,
        "stop_strings": ["END"],
        "suppress_tokens": [3],
        "do_sample": False,
    }
    load_defaults(tmp_path, asked | {"max_new_tokens": 64, "top_p": 1.5})
    (record,) = caplog.records
    transformers_accepts(tmp_path)
    for part in (
        "typical_p = 0.9",
        "num_beams = 4",
        "stop_strings = ['END']",
        "suppress_tokens = [3]",
        "do_sample",
        "max_new_tokens = 64",
        "top_p = 1.5 (it must be",
    ):
        assert part in record.getMessage()


def test_every_key_that_is_named_is_one_of_transformers(tmp_path, caplog):
    from transformers import GenerationConfig

    from moebius.text.defaults import _NOT_DONE

    assert set(_NOT_DONE) <= vars(GenerationConfig()).keys()
