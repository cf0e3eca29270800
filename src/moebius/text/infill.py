"""Filling in the middle: what stands between a text before the gap and a text behind it.

Models that were trained for it (arXiv 2207.14255) have tokens that mark prefix, suffix and middle;
each family its own. They are found in the vocabulary by their names.
"""

from dataclasses import dataclass

from moebius.errors import ContextExceededError, RequestError
from moebius.text.prompts import EncodedPrompt
from moebius.text.tokenizer import Tokenizer

# Ends of a file, of a repository's name, of a text: a middle never goes beyond them.
_ENDS = (
    "<|file_sep|>",
    "<|repo_name|>",
    "<|file_separator|>",
    "<file_sep>",
    "<reponame>",
    "<repo_name>",
    "<|endoftext|>",
    "<|end▁of▁sentence|>",
    "▁<EOT>",
)


@dataclass(frozen=True, slots=True)
class InfillFamily:
    """The tokens of one family; the suffix stands first where there is no token for the middle.

    gap: the token between prefix and suffix; middle: the one that the middle follows.
    """

    prefix: str
    gap: str
    middle: str | None

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.prefix, self.gap, *(() if self.middle is None else (self.middle,)))


FAMILIES = (
    InfillFamily("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    InfillFamily("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    InfillFamily("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillFamily("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    InfillFamily("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    InfillFamily("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    InfillFamily("[PREFIX]", "[SUFFIX]", None),  # Codestral: [SUFFIX]s[PREFIX]p
)


def infill_prompt(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    add_special_tokens: bool = True,
    at_most: int,
) -> EncodedPrompt:
    """The prompt whose answer belongs between `prefix` and `suffix`.

    Both are encoded as plain text, whatever they spell. It begins as any text does (BOS). Raises
    RequestError(param="suffix") where the vocabulary has no family's tokens, ContextLengthError for
    more than `at_most` ids.
    """
    family, ids = _family(tokenizer)
    for text in (prefix, suffix):
        tokenizer.check_size(text, at_most, "prompt")
    before = tokenizer.encode_ordinary(prefix)
    after = _inside(tokenizer, suffix)
    if family.middle is None:
        body = [ids[family.gap], *after, ids[family.prefix], *before]
    else:
        body = [ids[family.prefix], *before, ids[family.gap], *after, ids[family.middle]]
    prompt = [*(tokenizer.opening if add_special_tokens else ()), *body]
    if len(prompt) > at_most:
        raise ContextExceededError(at_most, len(prompt))
    ends = {tokenizer.token_id(name) for name in _ENDS} | set(ids.values())
    return EncodedPrompt(prompt, end_ids=frozenset(end for end in ends if end is not None))


def _family(tokenizer: Tokenizer) -> tuple[InfillFamily, dict[str, int]]:
    """The vocabulary's family, and its tokens' ids; RequestError naming what is missing of the one
    that it comes closest to."""
    nearest = FAMILIES[0]
    missing: list[str] = []
    for family in FAMILIES:
        ids = {name: tokenizer.token_id(name) for name in family.tokens}
        found = {name: id for name, id in ids.items() if id is not None}
        lacks = [name for name in family.tokens if name not in found]
        if not lacks:
            return family, found
        if found and not (missing and len(missing) <= len(lacks)):
            nearest = family
            missing = lacks
    names = ", ".join(missing or nearest.tokens)
    hint = "" if missing else " (nor another family's tokens for this)"
    raise RequestError(
        f"suffix: this model cannot fill in the middle: its vocabulary has no {names}{hint}",
        param="suffix",
    )


_BEFORE = "☺"


def _inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that does not begin one: without the space that sentencepiece puts in front."""
    ids = tokenizer.encode_ordinary(text)
    if not ids or text.startswith(" ") or not tokenizer.token_text(ids[0]).startswith(" "):
        return ids
    first = tokenizer.encode_ordinary(_BEFORE)
    both = tokenizer.encode_ordinary(_BEFORE + text)
    return both[len(first) :] if both[: len(first)] == first else ids
