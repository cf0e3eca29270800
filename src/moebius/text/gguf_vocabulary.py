"""The vocabulary in a GGUF file's metadata, checked: what its keys say of tokens, by id.

Whatever a file says may be wrong; each error names the key.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import IntEnum

from moebius.errors import TokenizerError
from moebius.text.gguf_values import PREFIX, numbers, shown, string, strings

ADVICE = "give the model's own with --tokenizer DIR, or put its tokenizer.json beside the file"


class Kind(IntEnum):
    """What tokenizer.ggml.token_type says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# The keys that name one token, by what templates call it.
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
# The keys of tokens that end a text, and what ends a piece of infilled code.
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# What llama.cpp takes where a key is missing, by tokenizer.ggml.model.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "t5": {"eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0},
}
# Tokens that end a text wherever they are, as in llama.cpp: whatever kind a file gives them, ...
_END_NAMES = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
    "<|tool_response>",
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
}
# ... and those whose text may as well be a word of the vocabulary (HTML's </s>), if they are none.
_END_NAMES_IF_ADDED = {
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
    "<PAD>",
    "[PAD]",
    "<fim-pad>",
    "<fim_pad>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
}
# More than any published token has; what is made of a token may take its square in time.
_LONGEST_TOKEN = 1024
# A u32 that stands for no token.
_NONE = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id.

    model     tokenizer.ggml.model
    kinds     of each token
    scores    of each token, where the file has them
    named     ids by the names that templates have for them (bos_token, ...)
    end_ids   all that end a text
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    named: Mapping[str, int]
    end_ids: frozenset[int]

    def of_kind(self, *kinds: Kind) -> list[int]:
        """The ids of tokens of these kinds, in order."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]

    def special_tokens(self) -> dict[str, str]:
        """Text by name, as special_tokens_map.json has it."""
        return {name: self.tokens[i] for name, i in self.named.items()}


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """Raises TokenizerError naming the key that is missing or wrong."""
    model = string(metadata, f"{PREFIX}model")
    if model is None:
        raise TokenizerError(f"the file has no {PREFIX}model, so no tokenizer; {ADVICE}")
    tokens = _tokens(metadata)
    kinds = _kinds(metadata, tokens)
    ids = _ids(metadata, model, tokens, kinds)
    if kinds is None:
        kinds = _guessed_kinds(tokens, ids)
    end_ids = _end_ids(tokens, kinds, ids)
    return Vocabulary(
        model=model,
        tokens=tokens,
        kinds=kinds,
        scores=_scores(metadata, tokens),
        named={name: i for name, key in _NAMED.items() if (i := ids[key]) is not None},
        end_ids=end_ids,
    )


def end_ids_by_key(metadata: Mapping[str, object]) -> frozenset[int]:
    """The ids that the file's keys give for the end of a text.

    Raises TokenizerError naming a key that is wrong.
    """
    ids = [_id(metadata, f"{end}_token_id", _NONE) for end in _ENDS]
    return frozenset(i for i in ids if i is not None)


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    found = strings(metadata, "tokens")
    if not found:
        raise TokenizerError(f"{PREFIX}tokens is missing or empty; {ADVICE}")
    longest = max(map(len, found))
    if longest > _LONGEST_TOKEN:
        raise TokenizerError(
            f"{PREFIX}tokens holds one of {longest} characters; at most {_LONGEST_TOKEN} are read"
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(found)] if "" in found else found
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if first.setdefault(token, i) != i:
                raise TokenizerError(
                    f"{PREFIX}tokens holds {shown(token)} twice, as {first[token]} and {i}"
                )
    return tokens


def _kinds(metadata: Mapping[str, object], tokens: list[str]) -> list[int] | None:
    values = numbers(metadata, "token_type", {int}, len(tokens))
    if values is None:
        return None
    kinds: list[int] = values.copy()
    for i, token in enumerate(strings(metadata, "tokens") or []):
        if not token:
            kinds[i] = Kind.UNUSED
    return kinds


def _scores(metadata: Mapping[str, object], tokens: list[str]) -> list[float] | None:
    scores: list[float] | None = numbers(metadata, "scores", {int, float}, len(tokens))
    if scores is not None and any(map(math.isnan, scores)):
        place = next(i for i, score in enumerate(scores) if math.isnan(score))
        raise TokenizerError(f"{PREFIX}scores[{place}] is no number")
    return scores


def _id(metadata: Mapping[str, object], key: str, count: int) -> int | None:
    """The token that a key names; None where it names none."""
    value = metadata.get(f"{PREFIX}{key}")
    if value is None or value == _NONE:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise TokenizerError(
            f"{PREFIX}{key} is {shown(value)}; it must be a token's id, 0 to {count - 1}"
        )
    return value


def _ids(
    metadata: Mapping[str, object], model: str, tokens: list[str], kinds: list[int] | None
) -> dict[str, int | None]:
    """The tokens that keys name, by key; where one is missing, llama.cpp's default if it fits."""
    ends = (f"{end}_token_id" for end in _ENDS)
    found = {key: _id(metadata, key, len(tokens)) for key in (*_NAMED.values(), *ends)}
    for key, default in _DEFAULT_IDS.get(model, {}).items():
        if f"{PREFIX}{key}" not in metadata and default < len(tokens):
            special = kinds is None or kinds[default] in (Kind.UNKNOWN, Kind.CONTROL)
            found[key] = default if special else None
    return found


def _guessed_kinds(tokens: list[str], ids: Mapping[str, int | None]) -> list[int]:
    """For a file that says nothing of kinds: the tokens that keys name are control tokens."""
    kinds: list[int] = [Kind.NORMAL] * len(tokens)
    for token_id in ids.values():
        if token_id is not None:
            kinds[token_id] = Kind.CONTROL
    return kinds


def _end_ids(tokens: list[str], kinds: list[int], ids: Mapping[str, int | None]) -> frozenset[int]:
    """All ids that end a text; those that are known by name become control tokens."""
    ids_by_name = {token: i for i, token in enumerate(tokens) if token in _END_NAMES}
    for i, token in enumerate(tokens):
        if token in _END_NAMES_IF_ADDED and kinds[i] != Kind.NORMAL:
            ids_by_name[token] = i
    by_key = (ids[f"{end}_token_id"] for end in _ENDS)
    ends = {token_id for token_id in by_key if token_id is not None}
    ends.update(ids_by_name.values())
    for name in _not_ending(ids_by_name.keys()):
        ends.discard(ids_by_name.pop(name, -1))
    for token_id in ids_by_name.values():
        if kinds[token_id] != Kind.UNKNOWN:
            kinds[token_id] = Kind.CONTROL
    return frozenset(ends)


def _not_ending(names: Set[str]) -> list[str]:
    """Those of the names that end no text, by what stands beside them.

    In gpt-oss's and Solar's formats <|end|> ends one message of several; Gemma 4 does not use </s>.
    """
    found = []
    if names >= {"<|return|>", "<|call|>"} or names >= {"<|calls|>", "<|flush|>"}:
        found.append("<|end|>")
    if "<|tool_response>" in names:
        found.append("</s>")
    return found
