"""Tokenizers as keys of a GGUF file, and back: the same tokens, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from moebius.errors import TokenizerError
from moebius.quantize.vocabulary import vocabulary_metadata
from moebius.text import Tokenizer as OurTokenizer
from moebius.text import tokenizer_from_gguf
from text.tiny_tokenizers import SPECIALS, byte_level, llama, mistral

TEXTS = [
    "hello world, hello  dog\n",
    "def f(x):\n    return x + 1  # 😀 naïve\n",
    " Grüße 日本語 123 4567 <s> <|im_end|> x",
    "",
]


def saved(backend: Tokenizer, directory: Path) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    return directory


def with_all_merges(backend: Tokenizer) -> Tokenizer:
    """The same with every pair of tokens that makes another, as SentencePiece merges: the tokens in
    the order in which they were learned, the longer left parts first."""
    definition = json.loads(backend.to_str())
    model = definition["model"]
    words = set(model["vocab"]) - set(SPECIALS)
    made = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    model["merges"] = [
        [token[:cut], token[cut:]]
        for token in made
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in words and token[cut:] in words
    ]
    return Tokenizer.from_str(json.dumps(definition))


def without_a_merge(backend: Tokenizer) -> Tokenizer:
    """The same but for one: SentencePiece would make the token of those two all the same."""
    definition = json.loads(with_all_merges(backend).to_str())
    del definition["model"]["merges"][-1]
    return Tokenizer.from_str(json.dumps(definition))


def with_words(backend: Tokenizer, expression: str) -> Tokenizer:
    """The same, cutting words by an expression."""
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    return backend


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("backend", "model", "pre"),
    [
        (byte_level(), "gpt2", "olmo"),  # NFC, and GPT-2's words
        (with_words(byte_level(), QWEN2), "gpt2", "qwen2"),
        (with_all_merges(llama()), "llama", "default"),
    ],
    ids=["olmo", "qwen2", "sentencepiece"],
)
def test_what_is_written_is_read_as_the_same(
    backend: Tokenizer, model: str, pre: str, tmp_path: Path
) -> None:
    directory = saved(backend, tmp_path)
    metadata = vocabulary_metadata(directory, 1000)
    assert metadata["tokenizer.ggml.model"] == model
    assert metadata["tokenizer.ggml.pre"] == pre
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(tokens) == 1000
    size = backend.get_vocab_size(with_added_tokens=True)
    assert tokens[:size] == [backend.id_to_token(i) for i in range(size)]
    assert tokens[size] == f"[PAD{size}]"
    ours = tokenizer_from_gguf(metadata)
    original = OurTokenizer.load(directory)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert metadata["tokenizer.ggml.eot_token_id"] == 4


def test_a_word_that_is_looked_up_has_a_name_of_its_own(tmp_path: Path) -> None:
    """Llama 3 and Granite cut alike; Llama 3 looks a word up before it merges."""
    plain = with_words(byte_level(), LLAMA3)
    plain.normalizer = None
    definition = json.loads(plain.to_str())
    definition["model"]["ignore_merges"] = True
    looks_up = Tokenizer.from_str(json.dumps(definition))
    names = []
    for number, backend in enumerate((plain, looks_up)):
        directory = tmp_path / str(number)
        directory.mkdir()
        names.append(vocabulary_metadata(saved(backend, directory), 1000)["tokenizer.ggml.pre"])
    assert names == ["dbrx", "llama-bpe"]


def test_bos_is_said_where_it_is_added(tmp_path: Path) -> None:
    directory = saved(with_all_merges(llama()), tmp_path)
    metadata = vocabulary_metadata(directory, 1000)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    kinds = metadata["tokenizer.ggml.token_type"]
    assert isinstance(kinds, list)
    assert kinds[:4] == [3, 3, 2, 6]  # control, control, unknown, and the first byte


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (without_a_merge(llama()), "not what scores stand for"),
        (with_words(byte_level(), "[a-z]+"), "has no name"),
        (Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, "<unk>")), "WordLevel"),
    ],
    ids=["merges", "words", "model"],
)
def test_what_cannot_be_said_is_refused(backend: Tokenizer, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=f"{reason}.*--quantization"):
        vocabulary_metadata(saved(backend, tmp_path), 1000)


def test_a_vocabulary_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="logits are 100 wide"):
        vocabulary_metadata(saved(byte_level(), tmp_path), 100)


def test_mistrals_first_space(tmp_path: Path) -> None:
    """A space before the first word alone is what llama.cpp does; ids agree or it is refused."""
    directory = saved(with_all_merges(mistral()), tmp_path)
    metadata = vocabulary_metadata(directory, 1000)
    ours = tokenizer_from_gguf(metadata)
    original = OurTokenizer.load(directory)
    for text in TEXTS[:2]:
        assert ours.encode(text) == original.encode(text)
