"""A model directory's tokenizer as the keys of a GGUF file.

Such a file holds tokens, their kinds and merges; how a text is cut into words it says by a name
alone (tokenizer.ggml.pre), so a tokenizer whose way of cutting has no name cannot be written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.errors import TokenizerError
from moebius.gguf.reader import Value
from moebius.text import GenerationDefaults, Tokenizer
from moebius.text.gguf_pre import SPLITTINGS

_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
_ADVICE = (
    "a GGUF file cannot describe it; load the model with --quantization instead, which keeps its "
    "tokenizer"
)
_PREFIX = "tokenizer.ggml."


def vocabulary_metadata(directory: Path, size: int) -> dict[str, Value]:
    """tokenizer.* of a model whose logits are `size` wide.

    Raises TokenizerError for what is no byte-level BPE, or cuts texts in a way without a name.
    """
    tokenizer = Tokenizer.load(directory)
    definition = tokenizer.definition
    model = definition["model"]
    where = f"{directory / 'tokenizer.json'}"
    _check_bpe(definition, where)
    tokens, kinds = _tokens(definition, size, where)
    metadata: dict[str, Value] = {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": _splitting(definition, where),
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}token_type": kinds,
        f"{_PREFIX}merges": [_merge(each) for each in model["merges"]],
    }
    return metadata | _ends(tokenizer, directory) | _templates(tokenizer)


def _check_bpe(definition: Mapping[str, Any], where: str) -> None:
    model = definition["model"]
    decoder = definition.get("decoder") or {}
    if model["type"] != "BPE" or decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"{where} is no byte-level BPE: {_ADVICE}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"{where}: {key} is {model[key]!r}: {_ADVICE}")


def _tokens(definition: Mapping[str, Any], size: int, where: str) -> tuple[list[str], list[int]]:
    """Each id's token and kind; ids without one are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [_UNUSED] * size
    known = {i: (token, _NORMAL) for token, i in definition["model"]["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = _CONTROL if added["special"] else _USER_DEFINED
        known[added["id"]] = (added["content"], kind)
    beyond = max(known, default=-1)
    if beyond >= size:
        raise TokenizerError(f"{where} has token {beyond}, but the model's logits are {size} wide")
    for i, (token, kind) in known.items():
        tokens[i] = token
        kinds[i] = kind
    return tokens, kinds


def _merge(merge: object) -> str:
    """As one line; older files have it so."""
    return " ".join(merge) if isinstance(merge, list) else str(merge)


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
    found: dict[str, Value] = {f"{_PREFIX}add_bos_token": framed != []}
    if bos is not None:
        found[f"{_PREFIX}bos_token_id"] = bos
    ends = GenerationDefaults.load(directory, tokenizer).eos_ids
    eos = tokenizer.eos_id
    if eos is None and ends:
        eos = min(ends)
    if eos is not None:
        found[f"{_PREFIX}eos_token_id"] = eos
        others = sorted(ends - {eos})
        if others:
            found[f"{_PREFIX}eot_token_id"] = others[0]
    padding = tokenizer.special_id("pad_token")
    if padding is not None:
        found[f"{_PREFIX}padding_token_id"] = padding
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
