"""A model directory's tokenizer as the keys of a GGUF file.

Such a file holds tokens, their kinds, and merges or scores; how a text is cut into words it says
by a name alone (tokenizer.ggml.pre). A tokenizer whose way of cutting has none cannot be written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.errors import TokenizerError
from moebius.gguf.reader import Value
from moebius.text import GenerationDefaults, Tokenizer, tokenizer_from_gguf
from moebius.text.gguf_models import merges_of_scores
from moebius.text.gguf_pre import SPLITTINGS
from moebius.text.gguf_values import PREFIX
from moebius.text.gguf_vocabulary import Kind, read_vocabulary

_ADVICE = (
    "a GGUF file cannot describe it; load the model with --quantization instead, which keeps its "
    "tokenizer"
)
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Texts that tokenizers cut apart where they differ.
_PROBES: tuple[str, ...] = (
    "",
    "Hello, World! It's 12345.67 o'clock,  isn't it?",
    "def f(x):\n    return x**2 + 3 * x  # naïve\n\n\n\tif x >= 10_000:\r\n",
    "  two spaces, three   spaces, a tab\tand an end ",
    "Ünïcödé, 日本語のテキスト, Русский текст, العربية, हिन्दी, 😀👍🏽",
    "CamelCaseWords snake_case_words HTTPServer2 x=y;z!=w --flag /usr/bin a.b.c <tag/>",
)


def vocabulary_metadata(directory: Path, size: int) -> dict[str, Value]:
    """tokenizer.* of a model whose logits are `size` wide.

    Raises TokenizerError for what is neither a byte-level BPE that cuts texts in a way with a name,
    nor a BPE of SentencePiece's kind.
    """
    tokenizer = Tokenizer.load(directory)
    definition = tokenizer.definition
    where = f"{directory / 'tokenizer.json'}"
    model = definition["model"]
    if model["type"] == "Unigram":
        raise TokenizerError(
            f"{where}: its model is Unigram, which GGUF files are read with, and not written; "
            "load the model with --quantization instead, which keeps its tokenizer"
        )
    if model["type"] != "BPE":
        raise TokenizerError(f"{where}: its model is {model['type']}: {_ADVICE}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"{where}: {key} is {model[key]!r}: {_ADVICE}")
    tokens, kinds = _tokens(definition, size, where)
    metadata: dict[str, Value] = {f"{PREFIX}tokens": tokens}
    if model.get("byte_fallback"):
        _mark_bytes(tokens, kinds, model.get("unk_token"))
        metadata |= _sentencepiece(definition, tokens, where)
    else:
        metadata |= _byte_level(definition, where)
    metadata[f"{PREFIX}token_type"] = [int(kind) for kind in kinds]
    metadata |= _ends(tokenizer, directory) | _templates(tokenizer)
    _check_same(tokenizer, metadata, where)
    return metadata


def _byte_level(definition: Mapping[str, Any], where: str) -> dict[str, Value]:
    """GPT-2's kind."""
    decoder = definition.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"{where} is no byte-level BPE: {_ADVICE}")
    return {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": _splitting(definition, where),
        f"{PREFIX}merges": [" ".join(pair) for pair in _merges(definition)],
    }


def _sentencepiece(
    definition: Mapping[str, Any], tokens: list[str], where: str
) -> dict[str, Value]:
    """SentencePiece's kind: instead of merges a score for each token, the higher the earlier."""
    order: dict[str, int] = {}
    for left, right in _merges(definition):
        order.setdefault(left + right, len(order))
    last = len(order)
    scores = [-float(order.get(token, last + i)) for i, token in enumerate(tokens)]
    return {
        f"{PREFIX}model": "llama",
        f"{PREFIX}pre": "default",
        f"{PREFIX}scores": scores,
        f"{PREFIX}add_space_prefix": _puts_space_first(definition, where),
    }


def _puts_space_first(definition: Mapping[str, Any], where: str) -> bool:
    """Whether a text gets a space in front. Raises TokenizerError where spaces are no ▁."""
    normalizer = json.dumps(definition.get("normalizer"))
    pre_tokenizer = definition.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "Metaspace":
        return bool(pre_tokenizer.get("prepend_scheme") != "never")
    replaced = json.dumps(_SPACE) in normalizer and "Replace" in normalizer
    if pre_tokenizer or not replaced:
        raise TokenizerError(f"{where}: it cuts texts in a way of its own; {_ADVICE}")
    return "Prepend" in normalizer


def _mark_bytes(tokens: list[str], kinds: list[int], unknown: str | None) -> None:
    """The kinds of tokens that stand for one byte, and of the one for what is unknown."""
    for i, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            kinds[i] = Kind.BYTE
        elif token == unknown:
            kinds[i] = Kind.UNKNOWN


def _check_same(tokenizer: Tokenizer, metadata: Mapping[str, Value], where: str) -> None:
    """Raises TokenizerError where what is made of the keys cuts a text otherwise."""
    probes = _PROBES
    if f"{PREFIX}scores" in metadata:
        # SentencePiece puts a space before a text's own, which not all tokenizer.json do.
        probes = tuple(text for text in _PROBES if not text.startswith(" "))
        # Scores stand for every merge that there could be.
        stood_for = set(merges_of_scores(read_vocabulary(metadata)))
        if stood_for != set(_merges(tokenizer.definition)):
            raise TokenizerError(f"{where}: its merges are not what scores stand for; {_ADVICE}")
    made = tokenizer_from_gguf(metadata)
    for text in probes:
        if made.encode(text) != tokenizer.encode(text):
            raise TokenizerError(
                f"{where}: what a GGUF file can say of it gives {text[:24]!r} other tokens; "
                f"{_ADVICE}"
            )


def _tokens(definition: Mapping[str, Any], size: int, where: str) -> tuple[list[str], list[int]]:
    """Each id's token and kind; ids without one are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds: list[int] = [Kind.UNUSED] * size
    known = {i: (token, Kind.NORMAL) for token, i in definition["model"]["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = Kind.CONTROL if added["special"] else Kind.USER_DEFINED
        known[added["id"]] = (added["content"], kind)
    beyond = max(known, default=-1)
    if beyond >= size:
        raise TokenizerError(f"{where} has token {beyond}, but the model's logits are {size} wide")
    for i, (token, kind) in known.items():
        tokens[i] = token
        kinds[i] = kind
    return tokens, kinds


def _merges(definition: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, in order; older files have them as lines."""
    found = []
    for merge in definition["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else str(merge).split(" ", 1)
        found.append((left, right))
    return found


def _splitting(definition: Mapping[str, Any], where: str) -> str:
    """The name of the way in which the tokenizer cuts texts."""
    steps = _steps(definition.get("pre_tokenizer"))
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise TokenizerError(
            f"{where}: its normalizer {normalizer.get('type')} is unknown; {_ADVICE}"
        )
    looks_up = bool(definition["model"].get("ignore_merges"))
    found = {
        name
        for name, splitting in SPLITTINGS.items()
        if splitting.ignore_merges == looks_up
        and _steps(json.loads(splitting.pre_tokenizer().__getstate__())) == steps
    }
    for name, splitting in SPLITTINGS.items():
        if name in found and splitting.nfc == (normalizer is not None):
            return name
    for name in SPLITTINGS:
        if name in found:
            return name
    raise TokenizerError(
        f"{where}: the way in which it cuts texts has no name in GGUF files; {_ADVICE}"
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A pre-tokenizer's steps, without what changes no token."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    return [{key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}]


def _ends(tokenizer: Tokenizer, directory: Path) -> dict[str, Value]:
    """Which tokens begin and end texts, and whether they are added."""
    framed = tokenizer.encode("")
    bos = tokenizer.bos_id
    if framed not in ([], [bos]):
        raise TokenizerError(
            f"{directory}: its tokenizer puts {framed} round each text, a GGUF file BOS alone"
        )
    found: dict[str, Value] = {f"{PREFIX}add_bos_token": framed != []}
    if bos is not None:
        found[f"{PREFIX}bos_token_id"] = bos
    ends = GenerationDefaults.load(directory, tokenizer).eos_ids
    eos = tokenizer.eos_id
    if eos is None and ends:
        eos = min(ends)
    if eos is not None:
        found[f"{PREFIX}eos_token_id"] = eos
        others = sorted(ends - {eos})
        if others:
            found[f"{PREFIX}eot_token_id"] = others[0]
    padding = tokenizer.special_id("pad_token")
    if padding is not None:
        found[f"{PREFIX}padding_token_id"] = padding
    return found


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    """Chat templates; the plain one has no name."""
    found: dict[str, Value] = {}
    for name, source in tokenizer.templates.items():
        if name == "default":
            found["tokenizer.chat_template"] = source
        else:
            found[f"tokenizer.chat_template.{name}"] = source
    return found
