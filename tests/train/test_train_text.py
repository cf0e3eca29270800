"""The tokenizer, the chat template and the conversations, against transformers and the texts
themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import ConfigError
from moebius.train.corpus import Document
from moebius.train.data import PreparedData, bytes_per_token
from moebius.train.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer
from stdlib.prepare import conversations, read_library, render_chat


def test_training_twice_gives_the_same_tokenizer(library: Path) -> None:
    texts = [d.text for d in read_library(0.2, library)]
    first, second = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 400
    assert [first.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(data_tokenizer: PreparedData, text: str) -> None:
    data_tokenizer.tokenizer.encode_special_tokens = False
    ids = data_tokenizer.tokenizer.encode(text).ids
    assert data_tokenizer.tokenizer.decode(ids) == text
    assert sum(bytes_per_token(data_tokenizer.tokenizer)[ids].tolist()) == len(text.encode())


@pytest.fixture(scope="module")
def data_tokenizer(data: PreparedData) -> PreparedData:
    return data


def test_impossible_vocabularies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fewer than tokenizer\.vocab_size = 4096"):
        train_tokenizer(["a short text"], 4096)


def test_the_template_is_what_training_rendered(data: PreparedData, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(data.tokenizer, tmp_path, 128)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "What is `x`?"},
        {"role": "assistant", "content": "A name."},
    ]
    assert loaded.apply_chat_template(messages, tokenize=False) == render_chat(messages)
    prompt = loaded.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert render_chat(messages).startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")
    text = "def f():\n    return '<|im_end|>'\n"
    assert loaded(text)["input_ids"] == data.tokenizer.encode(text).ids


def test_answers_are_found_in_the_documents(library: Path) -> None:
    documents = [d for d in read_library(0.2, library) if d.split == "train"]
    chats = conversations(documents, 10_000, seed=1)
    assert len(chats) > 100
    squeezed = "".join("".join(d.text.split()) for d in documents)
    for user, assistant in chats:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert 40 <= len(assistant["content"]) <= 1200
        if user["content"].startswith("What does"):
            continue  # a docstring is evaluated: escapes differ from the source
        assert "".join(assistant["content"].split()) in squeezed
        if user["content"].startswith("Write"):
            ast.parse(assistant["content"])
    questions = {user["content"].split()[0] for user, _ in chats}
    assert questions == {"Write", "What", "Complete", "Explain"}


def test_which_conversations_depends_on_the_seed_alone(library: Path) -> None:
    documents = read_library(0.2, library)
    chosen = conversations(documents, 20, seed=1)
    assert conversations(documents[::-1], 20, seed=1) == chosen
    assert conversations(documents, 20, seed=2) != chosen
    others = [
        Document("train", "chat", "x", "text"),
        Document("train", "tests", "y", "def f(): pass"),
    ]
    assert conversations(others, 5, seed=1) == []
    heldout = [d._replace(split="heldout") for d in documents]
    assert conversations(heldout, 5, seed=1) == []
