"""A tokenizer made of a GGUF file's keys gives what the tokenizer gives that the keys were written
from."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers.tokenization_utils_base import generate_merges

from covering import pairwise
from moebius.errors import TokenizerError
from moebius.text import GenerationDefaults, tokenizer_from_gguf
from moebius.text.gguf_models import merges_of_scores
from moebius.text.gguf_vocabulary import read_vocabulary
from text.gguf_keys import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    charsmap,
    keys_of,
    nasty_texts,
)
from text.published_pre_tokenizers import IGNORE_MERGES, NFC, PUBLISHED
from text.tiny_tokenizers import CHATML, CORPUS, llama

TEXTS = nasty_texts(600)
# Of a corpus with something of everything that the tests' texts have.
TRAINING = [re.sub(r"<s>|<\|im_end\|>", "", text) for text in (*CORPUS, *nasty_texts(300, seed=1))]


def trained(pre: str, specials: list[str] | None = None, size: int = 420) -> Tokenizer:
    """A byte-level BPE in the shape of the tokenizer.json that models of this kind come with."""
    spec = json.loads(Tokenizer(models.BPE()).to_str())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PUBLISHED[pre]}
    backend = Tokenizer.from_str(json.dumps(spec))
    if pre in NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=specials or [],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return backend


def with_words(backend: Tokenizer) -> Tokenizer:
    """With words that no merge makes, which are tokens if words are looked up before merging."""
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = True
    vocab = spec["model"]["vocab"]
    for word in ("ĠHello", "camelCaseWord", "WORLD", "Ġ12345", "don"):
        vocab.setdefault(word, len(vocab))
    return Tokenizer.from_str(json.dumps(spec))


def assert_same(keys: dict[str, Any], backend: Tokenizer, texts: list[str] = TEXTS) -> None:
    """Ids and decoded texts are the backend's."""
    ours = tokenizer_from_gguf(keys)
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        assert ours.encode(text, add_special_tokens=False) == encoding.ids, text
    all_ids = [encoding.ids for encoding in encodings]
    for ids, text in zip(all_ids, backend.decode_batch(all_ids, False), strict=True):
        assert ours.decode(ids, skip_special_tokens=False) == text, ids


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level(pre):
    backend = trained(pre)
    backend.add_special_tokens(["<s>", "<|im_end|>"])
    if pre in IGNORE_MERGES:
        backend = with_words(trained(pre))
        backend.add_special_tokens(["<s>", "<|im_end|>"])
    assert_same(keys_of(backend, pre=pre), backend)


def behind(backend: Tokenizer) -> Tokenizer:
    """Qwen's layout: special tokens and others behind the vocabulary."""
    backend.add_special_tokens(["<s>", "<|im_start|>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    backend.add_special_tokens(["<|im_end|>"])
    return backend


def within(backend: Tokenizer) -> Tokenizer:
    """Others among the vocabulary's own tokens."""
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("the", "é", "<s")])
    return behind(backend)


LAYOUTS = {
    "before": lambda pre: trained(pre, ["<s>", "<|im_start|>", "<|im_end|>", "<tool_call>"]),
    "behind": lambda pre: behind(trained(pre)),
    "within": lambda pre: within(trained(pre)),
}


@pytest.mark.parametrize(
    ("pre", "layout", "padding"), pairwise(["gpt-2", "tekken", "qwen2"], LAYOUTS, [0, 7])
)
def test_added_tokens_wherever_they_are(pre, layout, padding):
    backend = LAYOUTS[layout](pre)
    if pre in IGNORE_MERGES:
        backend.model.ignore_merges = True
    size = backend.get_vocab_size() + padding
    keys = keys_of(backend, pre=pre, size=size)
    texts = [
        f"{a}<s>{b} <tool_call><|im_end|>" for a, b in zip(TEXTS[:200], TEXTS[200:400], strict=True)
    ]
    assert_same(keys, backend, texts)
    ours = tokenizer_from_gguf(keys)
    assert ours.vocab_size == size - padding
    specials = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    assert ours.special_ids == specials


@pytest.mark.parametrize("pre", ["gpt-2", "tekken"])
def test_unused_tokens_before_added_ones(pre):
    """The library numbers added tokens itself; their ids are the file's all the same."""
    keys = keys_of(behind(trained(pre)), pre=pre)
    plain = tokenizer_from_gguf(keys)
    start = keys["tokenizer.ggml.token_type"].index(CONTROL)
    keys["tokenizer.ggml.tokens"][start:start] = ["[PAD1]", "[PAD2]", "[PAD3]"]
    keys["tokenizer.ggml.token_type"][start:start] = [UNUSED] * 3
    ours = tokenizer_from_gguf(keys)
    for text in ("hello<s> world<tool_call>", "<|im_end|>[PAD2]"):
        expected = [i + 3 if i >= start else i for i in plain.encode(text)]
        assert ours.encode(text) == expected
        assert ours.decode(expected, skip_special_tokens=False) == text
    assert not ours.special_ids & set(ours.encode_ordinary("<s>"))


@pytest.mark.parametrize("pre", ["gpt-2", "tekken", "qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_tokens_are_no_text_of_a_client(pre, layout):
    ours = tokenizer_from_gguf(keys_of(LAYOUTS[layout](pre), pre=pre))
    for text in ["<s>", "a <|im_end|> b", "x<|im_start|>", "<|im_end|><s>"]:
        ids = ours.encode_ordinary(text)
        assert not ours.special_ids & set(ids)
        assert ours.decode(ids) == text


def test_a_byte_without_a_token_is_left_out():
    """SmolLM's vocabulary lacks some bytes, and its tokenizer drops what needs them."""
    backend = trained("smollm")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    lost = {"Ã", "ć"}
    kept = [token for token in model["vocab"] if not lost & set(token)]
    model["vocab"] = {token: i for i, token in enumerate(kept)}
    model["merges"] = [merge for merge in model["merges"] if not lost & set("".join(merge))]
    backend = Tokenizer.from_str(json.dumps(spec))
    assert_same(keys_of(backend, pre="smollm", unknown_token_id=0), backend)


def test_a_file_without_the_key_is_cut_with_a_warning(caplog):
    keys = keys_of(trained("gpt-2"))
    assert tokenizer_from_gguf(keys).encode("a1234") == tokenizer_from_gguf(
        {**keys, "tokenizer.ggml.pre": "default"}
    ).encode("a1234")
    assert caplog.text.count("tokenizer.ggml.pre") == 2
    assert "--tokenizer" in caplog.text


# SentencePiece


def spm_keys(**more: Any) -> dict[str, Any]:
    """Keys of a vocabulary like Llama 2's: unknown, BOS, EOS, bytes, and words with a score each,
    which falls from one to the next."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=["<unk>"])
    )
    words = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)[1:]
    # As sentencepiece has it: what merges make first, characters last.
    pieces = [w for w in words if len(w) > 1] + [w for w in words if len(w) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def spm_ids(keys: dict[str, Any], text: str) -> list[int]:
    """By sentencepiece's rule: of all pairs of neighbours that make a token, join the one of the
    best score, the first of several, until none is left; what is no token becomes its bytes."""
    tokens = keys["tokenizer.ggml.tokens"]
    kinds = keys["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
    scores = keys["tokenizer.ggml.scores"]
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found = []
    for symbol in symbols:
        known = ids.get(symbol)
        found += [3 + byte for byte in symbol.encode()] if known is None else [known]
    return found


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_joins_the_best_pair_first(prefix):
    keys = spm_keys(add_space_prefix=prefix)
    ours = tokenizer_from_gguf(keys)
    for text in nasty_texts(600, seed=2):
        if "<s>" in text:
            continue
        expected = spm_ids(keys, text if prefix is False or not text else f" {text}")
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.decode(expected) == text


def test_bos_before_a_sentencepiece_text_unless_the_file_says_no():
    text = "hello world"
    plain = tokenizer_from_gguf(spm_keys()).encode(text, add_special_tokens=False)
    assert tokenizer_from_gguf(spm_keys()).encode(text) == [1, *plain]
    assert tokenizer_from_gguf(spm_keys(add_bos_token=False)).encode(text) == plain
    both = tokenizer_from_gguf(spm_keys(add_eos_token=True))
    assert both.encode(text) == [1, *plain, 2]


def test_llama_2s_own_file_is_met():
    """Its tokenizer.json has merges; a GGUF file has the scores that they came from."""
    backend = llama()
    keys = keys_of(backend, "llama")
    kinds = keys["tokenizer.ggml.token_type"]
    kinds[keys["tokenizer.ggml.tokens"].index("<unk>")] = UNKNOWN
    named = {
        f"{name}_token_id": backend.token_to_id(f"<{text}>")
        for name, text in (("bos", "s"), ("eos", "/s"), ("unknown", "unk"))
    }
    keys |= {f"tokenizer.ggml.{name}": i for name, i in named.items()}
    assert_same(keys, backend)
    assert tokenizer_from_gguf(keys).encode("hello") == backend.encode("hello").ids


def test_merges_are_transformers():
    keys = spm_keys()
    vocabulary = read_vocabulary(keys)
    tokens = {
        token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.kinds[i] == NORMAL
    }
    for scores in (vocabulary.scores, [-float(i // 7) for i in range(len(vocabulary.tokens))]):
        by_token = {token: scores[i] for token, i in tokens.items()}
        keys["tokenizer.ggml.scores"] = scores
        assert merges_of_scores(read_vocabulary(keys)) == generate_merges(tokens, by_token)


def test_a_control_token_is_made_of_no_text():
    """Its score of 0 is the best of all, and `<` and `s>` may be tokens."""
    keys = spm_keys()
    assert "<" in keys["tokenizer.ggml.tokens"]
    keys["tokenizer.ggml.tokens"] += ["s>", "unk>"]
    keys["tokenizer.ggml.scores"] += [-900.0, -901.0]
    keys["tokenizer.ggml.token_type"] += [NORMAL] * 2
    ours = tokenizer_from_gguf(keys)
    ids = ours.encode_ordinary("<s>, <unk>")
    assert not {0, 1, 2} & set(ids)
    assert ours.decode(ids) == "<s>, <unk>"


def test_user_defined_tokens_are_found_before_spaces_are_marked():
    """The converter writes Gemma's runs of spaces as spaces, of kind 4."""
    keys = spm_keys(add_space_prefix=False)
    keys["tokenizer.ggml.tokens"] += ["   ", "<table>"]
    keys["tokenizer.ggml.scores"] += [0.0, 0.0]
    keys["tokenizer.ggml.token_type"] += [USER_DEFINED] * 2
    spaces, table = (keys["tokenizer.ggml.tokens"].index(token) for token in ("   ", "<table>"))
    ours = tokenizer_from_gguf(keys)
    ids = ours.encode("a   b<table>", add_special_tokens=False)
    assert ids == [*spm_ids(keys, "a"), spaces, *spm_ids(keys, "b"), table]
    assert ours.decode(ids) == "a   b<table>"


def test_phi_3s_tokens_take_the_space_behind_them():
    keys = spm_keys()
    keys["tokenizer.ggml.tokens"] += ["<|user|>", "<|endoftext|>"]
    keys["tokenizer.ggml.scores"] += [0.0, 0.0]
    keys["tokenizer.ggml.token_type"] += [CONTROL] * 2
    user = keys["tokenizer.ggml.tokens"].index("<|user|>")
    phi = tokenizer_from_gguf({**keys, "general.architecture": "phimoe"})
    plain = tokenizer_from_gguf({**keys, "general.architecture": "llama"})
    assert phi.encode("<|user|>\n hello") == [1, user, *spm_ids(keys, " hello")]
    assert plain.encode("<|user|>\n hello") == [1, user, *spm_ids(keys, " \n hello")]
    assert phi.encode("<|endoftext|> a") == [1, user + 1, *spm_ids(keys, "  a")]


# Gemma 4


def gemma4() -> Tokenizer:
    """A BPE of characters with spaces marked and no words cut, as Gemma's tokenizer.json has it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:4]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(["<|turn>", "<turn|>"])
    return backend


def gemma4_keys(backend: Tokenizer) -> dict[str, Any]:
    named = {
        f"{name}_token_id": backend.token_to_id(f"<{text}>")
        for name, text in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"))
    }
    keys = keys_of(backend, "gemma4", add_bos_token=True, scores=None, **named)
    keys["tokenizer.ggml.token_type"][named["unknown_token_id"]] = UNKNOWN
    return keys


def test_gemma_4():
    backend = gemma4()
    assert_same(gemma4_keys(backend), backend)


def test_gemma_4s_bos_is_the_templates():
    """The flag says true; the published tokenizer adds none, and its template writes one."""
    backend = gemma4()
    keys = gemma4_keys(backend)
    keys["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}"
    )
    ours = tokenizer_from_gguf(keys)
    bos = backend.token_to_id("<bos>")
    assert bos not in ours.encode("hello")
    ids = ours.encode_chat([{"role": "user", "content": "hello"}])
    assert ids == backend.encode("<bos><|turn>hello<turn|>").ids
    assert ours.end_ids == {backend.token_to_id("<eos>"), backend.token_to_id("<turn|>")}


# T5


def unigram() -> Tokenizer:
    """T5's shape: a character map, extra spaces taken out, ▁ in front."""
    backend = Tokenizer(models.Unigram())
    steps: list[Any] = [normalizers.Precompiled(bytes(CHARSMAP))]
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    backend.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    return backend


CHARSMAP = charsmap({"\t": " ", "\n": " ", "ﬁ": "fi", "Ａ": "A", "①": "1", "Å": "Å"})


@pytest.mark.parametrize("signed", [False, True])
def test_unigram(signed):
    backend = unigram()
    octets = [byte - 256 if signed and byte > 127 else byte for byte in CHARSMAP]
    keys = keys_of(
        backend,
        "t5",
        precompiled_charsmap=octets,
        remove_extra_whitespaces=True,
        add_space_prefix=True,
        eos_token_id=1,
        unknown_token_id=2,
        padding_token_id=0,
    )
    keys["tokenizer.ggml.token_type"][2] = UNKNOWN
    assert_same(keys, backend)
    ours = tokenizer_from_gguf(keys)
    assert ours.encode("hello") == [*ours.encode("hello", add_special_tokens=False), 1]


def test_t5s_blanks_have_their_names():
    backend = unigram()
    size = backend.get_vocab_size()
    keys = keys_of(backend, "t5", size=size + 128, unknown_token_id=2)
    keys["tokenizer.ggml.token_type"][2] = UNKNOWN
    ours = tokenizer_from_gguf(keys)
    assert ours.encode("<extra_id_99><extra_id_0>", False) == [size, size + 99]


# Ends, templates, defaults


def ends(*tokens: tuple[str, int], **keys: Any) -> set[str]:
    """The texts of what ends a text in a vocabulary with these tokens and kinds beside others."""
    texts = [*"ab", *(text for text, _ in tokens)]
    found = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": [NORMAL] * 2 + [kind for _, kind in tokens],
            "tokenizer.ggml.merges": [],
            **{f"tokenizer.ggml.{key}": texts.index(value) for key, value in keys.items()},
        }
    )
    return {texts[i] for i in found.end_ids}


@pytest.mark.parametrize(
    ("tokens", "keys", "expected"),
    [
        # By key, whatever they are called.
        (["<e>", "<t>", "<m>"], {"eos_token_id": "<e>", "eot_token_id": "<t>"}, ["<e>", "<t>"]),
        (["<e>", "<m>"], {"eos_token_id": "<e>", "eom_token_id": "<m>"}, ["<e>", "<m>"]),
        # By name: Llama 3, Qwen, Gemma 4, Kimi.
        (["<|eot_id|>", "<|eom_id|>", "<|x|>"], {}, ["<|eot_id|>", "<|eom_id|>"]),
        (["<|im_end|>", "<|endoftext|>"], {"eos_token_id": "<|im_end|>"},
         ["<|im_end|>", "<|endoftext|>"]),
        (["<eos>", "<turn|>", "</s>", "<|tool_response>"], {},
         ["<eos>", "<turn|>", "<|tool_response>"]),
        (["[EOS]", "[EOT]", "[BOS]"], {}, ["[EOS]", "[EOT]"]),
        # gpt-oss: <|end|> ends a message, not the turn.
        (["<|end|>", "<|return|>", "<|call|>"], {"eos_token_id": "<|return|>"},
         ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|user|>"], {}, ["<|end|>"]),
    ],
)  # fmt: skip
def test_all_that_ends_a_text(tokens, keys, expected):
    assert ends(*((token, CONTROL) for token in tokens), **keys) == set(expected)


def test_an_end_of_the_wrong_kind_still_ends():
    """Files have <|im_end|> as an ordinary token; but an ordinary </s> is HTML's, as in Qwen's."""
    found = ends(("<|im_end|>", NORMAL), ("</s>", NORMAL), ("<|eot_id|>", USER_DEFINED))
    assert found == {"<|im_end|>", "<|eot_id|>"}
    assert ends(("</s>", USER_DEFINED)) == {"</s>"}


def chat_keys(**more: Any) -> dict[str, Any]:
    backend = trained("llama-bpe")
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    ids = {"bos_token_id": backend.token_to_id("<s>"), "eos_token_id": backend.token_to_id("</s>")}
    keys = keys_of(backend, pre="llama-bpe", **ids)
    return {**keys, "tokenizer.chat_template": CHATML, **more}


def test_a_template_that_writes_bos_gives_one():
    """The flag, which says true for this `pre` unless the file says otherwise, is for plain text."""
    for keys in (chat_keys(), chat_keys(**{"tokenizer.ggml.add_bos_token": True})):
        ours = tokenizer_from_gguf(keys)
        ids = ours.encode_chat([{"role": "user", "content": "hello"}])
        assert ids.count(ours.bos_id) == 1
        assert ids[0] == ours.bos_id
        assert ours.encode("hello")[0] == ours.bos_id
    without = tokenizer_from_gguf(chat_keys(**{"tokenizer.ggml.add_bos_token": False}))
    assert without.bos_id not in without.encode("hello")


def test_templates_by_name():
    tools = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | length }} tools"
    keys = chat_keys(
        **{"tokenizer.chat_template.tool_use": tools, "tokenizer.chat_templates": ["tool_use"]}
    )
    ours = tokenizer_from_gguf(keys)
    chat = [{"role": "user", "content": "hello "}]
    tool = {"type": "function", "function": {"name": "f"}}
    assert ours.decode(ours.encode_chat(chat, [tool])) == "hello 1 tools"
    assert "<|im_start|>user\nhello <|im_end|>" in ours.decode(ours.encode_chat(chat), False)


def test_a_template_runs_in_the_sandbox():
    keys = chat_keys(**{"tokenizer.chat_template": "{{ ''.__class__.__mro__ }}"})
    with pytest.raises(Exception, match="the chat template refuses these messages"):
        tokenizer_from_gguf(keys).encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(TokenizerError, match="chat template 'tool', line 1"):
        tokenizer_from_gguf(chat_keys(**{"tokenizer.chat_template.tool": "{% for %}"}))


def test_no_template_no_chat():
    without = chat_keys()
    del without["tokenizer.chat_template"]
    for keys in (without, chat_keys(**{"tokenizer.chat_template": ""})):
        assert not tokenizer_from_gguf(keys).has_chat_template


def test_defaults(caplog):
    keys = chat_keys(
        **{
            "tokenizer.ggml.eot_token_id": 5,
            "general.sampling.temp": 0.6000000238418579,
            "general.sampling.top_k": 20,
            "general.sampling.penalty_repeat": 1.0499999523162842,
            "general.sampling.mirostat": 2,
            "general.sampling.sequence": "top_k;temp",
        }
    )
    ours = tokenizer_from_gguf(keys)
    found = GenerationDefaults.from_gguf(keys, ours)
    assert found.sampling == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    assert found.eos_ids == {5, ours.eos_id, *ours.encode("<|im_end|>", False)}
    assert "mirostat" in caplog.text


def test_another_tokenizer_ends_as_the_file_says_too():
    other = tokenizer_from_gguf(spm_keys())
    assert GenerationDefaults.from_gguf({"tokenizer.ggml.eot_token_id": 7}, other).eos_ids == {2, 7}


def test_padding_says_nothing():
    """A u32 of all ones is -1, which old converters wrote for no token."""
    ours = tokenizer_from_gguf(spm_keys(padding_token_id=2**32 - 1))
    assert ours.end_ids == {2}
