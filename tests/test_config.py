"""Files that people edit are read whatever editor they used; JSON that we write is JSON whatever
the numbers are."""

from __future__ import annotations

import codecs
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from moebius.bench.report import save_json
from moebius.bench.workload import Dataset
from moebius.errors import ConfigError
from moebius.files import json_text, read_json
from moebius.inspect.corpus import read_documents
from moebius.models.store import open_checkpoint
from moebius.server.batch import read_batch
from moebius.text import GenerationDefaults, Tokenizer
from moebius.train.corpus import Corpus
from moebius.train.recipe import read_recipe
from moebius.train.tables import CorpusRecipe

MARK = codecs.BOM_UTF8.decode()


def strict(text: str) -> Any:
    """As a parser of another language reads it."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=no_constant)


@pytest.mark.case("C10")
def test_numbers_that_json_has_not_are_null() -> None:
    value = {
        "a": math.inf,
        "b": [-math.inf, math.nan, 1.5, {"c": (math.nan, True, "x", None)}],
        "d": 0.1,
    }
    assert strict(json_text(value)) == {
        "a": None,
        "b": [None, None, 1.5, {"c": [None, True, "x", None]}],
        "d": 0.1,
    }
    assert json_text({"b": 1, "a": 0.1}, indent=1, sort_keys=True) == '{\n "a": 0.1,\n "b": 1\n}'


@pytest.mark.case("C10")
def test_figures_of_a_benchmark_are_json(tmp_path: Path) -> None:
    save_json(tmp_path / "x.json", {"rate": math.inf, "times": [math.nan, 2.0]})
    found = strict((tmp_path / "x.json").read_text())
    assert (found["rate"], found["times"]) == (None, [None, 2.0])


def with_mark(path: Path) -> None:
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


@pytest.mark.case("C15")
def test_a_mark_before_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(f'{MARK}{{"a": "{MARK}é"}}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"a": f"{MARK}é"}, "one within a text stays"
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-16")
    with pytest.raises(ConfigError, match=r"x\.json cannot be read as JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.case("C15")
def test_every_text_file_of_a_model_directory_may_begin_with_a_mark(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "one.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    (model / "chat_template.jinja").write_text(template)
    (model / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>"}')
    texts = [*model.glob("*.json"), *model.glob("*.jinja")]
    assert len(texts) == 7
    for path in texts:
        with_mark(path)
    assert open_checkpoint(model).config == open_checkpoint(tiny_model).config
    tokenizer, plain = Tokenizer.load(model), Tokenizer.load(tiny_model)
    assert GenerationDefaults.load(model, tokenizer) == GenerationDefaults.load(tiny_model, plain)
    messages = [{"role": "user", "content": "naïve"}]
    assert tokenizer.encode_chat(messages) == plain.encode_chat(messages)
    assert tokenizer.bos_id == 1 and tokenizer.encode("def f(") == plain.encode("def f(")


LINE = '{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}'
READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "batch": ("x.jsonl", LINE, lambda path: [call.custom_id for call in read_batch(path)]),
    "bench": (
        "x.jsonl",
        '{"prompt": "x", "output_tokens": 3}',
        lambda path: Dataset("jsonl", path).samples(1),
    ),
    "corpus of JSON lines": (
        "x.jsonl",
        '{"text": "x"}',
        lambda path: list(Corpus(CorpusRecipe({"a": (str(path),)}))),
    ),
    "corpus of text": (
        "x.txt",
        "é\nx\n",
        lambda path: list(Corpus(CorpusRecipe({"a": (str(path),)}))),
    ),
    "text to inspect": ("x.txt", "é\nx\n", lambda path: read_documents([path], 100)),
    "recipe": (
        "x.toml",
        'name = "x"\n[corpus.files]\na = "x"\n[finetune]\ncheckpoint = "org/name"\n'
        "[training]\nsteps = 200\nrows_per_step = 1\nrow_length = 8\nlearning_rate = 0.1\n",
        read_recipe,
    ),
}


@pytest.mark.case("C15")
@pytest.mark.parametrize(("name", "text", "read"), READERS.values(), ids=READERS)
def test_a_mark_before_what_people_write(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any]
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    plain = read(tmp_path / name)
    with_mark(tmp_path / name)
    assert read(tmp_path / name) == plain
    assert MARK not in repr(plain) and plain


def test_a_tokenizer_of_another_encoding_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    text = (model / "tokenizer.json").read_text(encoding="utf-8")
    (model / "tokenizer.json").write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(model)
